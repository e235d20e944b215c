"""How far models are from an original on the same texts: attention, hidden states and next-token loss."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from longred_megatron.analysis.network import Network
from longred_megatron.analysis.walk import LayerValues, walk
from longred_megatron.errors import UserError
from longred_megatron.evaluation.intervals import Interval, mean_interval
from longred_megatron.evaluation.models import resolve_device
from longred_megatron.kernels.attention_divergence import attention_divergence
from longred_megatron.parallel.world import world


class Subject(NamedTuple):
    """A network, with another RoPE where `rotary` is one of `Network.rotary`."""

    network: Network
    rotary: Any = None

    def walk(self, texts: Tensor, positions: Tensor | None = None) -> Iterator[LayerValues]:
        return walk(self.network, texts, positions, self.rotary)


class Ranks(NamedTuple):
    """The processes that share the texts of a study."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, texts: Tensor) -> Tensor:
        """This rank's texts."""
        return texts[self.rank :: self.size]

    def bar(self, layers: int, texts: Tensor, description: str | None = None) -> Any:
        """A progress bar, to be told of each of `layers` of each text of this rank."""
        total = layers * len(self.part(texts))
        return tqdm(total=total, desc=description, unit="layer", disable=None if self.is_main else True)

    def check(self, on_disk: Callable[[], None]) -> None:
        """Calls `on_disk` on the first rank alone, as what tries to write must be. Every rank raises its UserError."""
        problems: list[list[str]] = [[]]
        if self.is_main:
            try:
                on_disk()
            except UserError as error:
                problems = [error.problems]
        if self.size > 1:
            dist.broadcast_object_list(problems)
        if problems[0]:
            raise UserError(*problems[0])

    def total(self, values: Tensor) -> Tensor:
        """Summed over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)  # the world: every rank has texts of its own
        return values


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Those that torchrun started; without it, this process alone. They talk over gloo: sums are small.

    A user's mistake within the block is the first rank's to tell: every rank finds it.
    """
    rank, size = world(os.environ)
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(rank, size)
    except UserError:
        if rank == 0:
            raise
        time.sleep(5)  # until the first rank has told, and torchrun ends the others
        sys.exit(2)
    finally:
        dist.destroy_process_group()


def study_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    device = resolve_device("auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


@dataclass(frozen=True)
class Drift:
    """Of one model against the original, means over texts and positions.

    heads: [layers, heads], KL(original || model) of the attention of each head, in nats.
    similarity: [layers], cosine of the layers' outputs. loss, original_loss: of the next token, in nats.
    by_text: [texts, 3], of each text the mean KL, the mean similarity, and the loss less the original's.
    """

    heads: Tensor
    similarity: Tensor
    loss: float
    original_loss: float
    by_text: Tensor

    @property
    def intervals(self) -> list[Interval | None]:
        """95 %, over texts, of the three means in `by_text`; None for a single text."""
        return list(mean_interval(self.by_text.numpy(), range(len(self.by_text))) or (None, None, None))

    @property
    def layers(self) -> Tensor:
        """[layers], mean over heads."""
        return self.heads.mean(1)

    def to_json(self) -> dict[str, Any]:
        """Layers by their number, from 1."""
        numbers = [str(k) for k in range(1, len(self.heads) + 1)]
        return {
            "layers": dict(zip(numbers, self.layers.tolist(), strict=True)),
            "heads": dict(zip(numbers, self.heads.tolist(), strict=True)),
            "similarity": dict(zip(numbers, self.similarity.tolist(), strict=True)),
            "mean_drift": self.layers.mean().item(),
            "mean_similarity": self.similarity.mean().item(),
            "loss": self.loss,
            "original_loss": self.original_loss,
            "intervals": {
                name: each and [each.low, each.high]
                for name, each in zip(("mean_drift", "mean_similarity", "loss_change"), self.intervals, strict=True)
            },
        }

    def shown(self) -> list[str]:
        """For people, with intervals: the mean KL, the mean similarity, and the change of the loss."""
        means = self.layers.mean().item(), self.similarity.mean().item(), self.loss - self.original_loss
        return [
            f"{mean:{how}}" + (f" ({interval.low:{how}} to {interval.high:{how}})" if interval else "")
            for mean, interval, how in zip(means, self.intervals, (".2e", ".4f", "+.4f"), strict=True)
        ]


@torch.inference_mode()
def measure_drift(
    tokens: Tensor, original: Subject, others: Sequence[Subject], ranks: Ranks | None = None, bar: Any = None
) -> list[Drift]:
    """Drift of each of `others` on tokens [texts, length], all models in step, a layer's piece of a text at a time.

    bar: a progress bar, told of each layer of each text.
    """
    architecture, (num_texts, length) = original.network.architecture, tokens.shape
    layers, heads = architecture.num_layers, architecture.num_attention_heads
    count, ranks = len(others), ranks or Ranks()
    drift, similarity = torch.zeros(count, layers, heads).double(), torch.zeros(count, layers).double()
    losses, by_text = torch.zeros(count + 1, num_texts).double(), torch.zeros(count, num_texts, 2).double()
    own = ranks.part(tokens)
    for theirs, *ours in zip(original.walk(own), *(other.walk(own) for other in others), strict=True):
        k, number = theirs.layer - 1, ranks.rank + ranks.size * theirs.text
        for i, each in enumerate(ours):
            divergence = _divergence(theirs, each).sum(1).cpu()
            cosine = F.cosine_similarity(each.hidden.float(), theirs.hidden.float(), dim=-1).sum().item()
            drift[i, k] += divergence
            similarity[i, k] += cosine
            by_text[i, number] += torch.tensor([divergence.mean(), cosine]) / (layers * length)
        if theirs.layer == layers:
            labels = own[theirs.text, 1:][theirs.tokens]
            for i, (subject, last) in enumerate(zip((original, *others), (theirs, *ours), strict=True)):
                losses[i, number] += next_token_loss(subject.network, last.hidden, labels) / (length - 1)
        if bar is not None and theirs.tokens.stop == length:
            bar.update()
    drift, similarity, losses, by_text = (ranks.total(each) for each in (drift, similarity, losses, by_text))
    by_text = torch.cat([by_text, (losses[1:] - losses[:1])[..., None]], dim=-1)
    drift, similarity, (original_loss, *loss) = (
        drift / tokens.numel(),
        similarity / tokens.numel(),
        losses.mean(1).tolist(),
    )
    return [Drift(drift[i], similarity[i], loss[i], original_loss, by_text[i]) for i in range(count)]


def _divergence(p: LayerValues, q: LayerValues) -> Tensor:
    return attention_divergence(p.query, p.keys(), q.query, q.keys(), p.scale, q.scale, p.start)


def next_token_loss(network: Network, hidden: Tensor, labels: Tensor) -> float:
    """Sum of the cross-entropy of a text's piece, in nats. hidden: [p, hidden], of the last layer; labels: the next
    tokens, [p], or [p - 1] at the text's end."""
    logits = network.head(hidden[: len(labels)]).float()
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum").item()
