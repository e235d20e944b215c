"""Next-token loss by position in the window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from longred_megatron.evaluation.intervals import Interval, mean_interval
from longred_megatron.evaluation.models import CHUNK_TOKENS, CausalModel
from longred_megatron.evaluation.texts import Windows

NUM_BUCKETS = 32


@dataclass(frozen=True)
class PositionBucket:
    """Mean loss (nats a token) of the tokens at positions start <= p < stop, counted from 0 in the window, or the
    difference of two models' losses there."""

    start: int
    stop: int
    loss: float
    interval: Interval | None


@dataclass(frozen=True)
class LossDifference:
    """A model's loss less the reference's on the same windows, in nats a token; exp(loss) is the ratio of the
    perplexities. The intervals are over documents, of the differences of each."""

    loss: float
    interval: Interval | None
    buckets: tuple[PositionBucket, ...]


@dataclass(frozen=True)
class LossByPosition:
    """Mean next-token loss over windows of one length.

    loss = (1 / (windows * (window - 1))) * sum over windows and positions p >= 1 of -log P(token p | tokens
    before p), in nats; perplexity = exp(loss); loss_standard_error: of the mean over windows, None for a
    single one. num_documents: that the windows come from, by which intervals resample (None for a single one);
    num_joined_windows: cut from several short documents in a row. losses: of each window, in the order of
    `documents`. against_reference: None for the reference, and where the tokenizer is not the reference's.
    """

    window: int
    num_windows: int
    num_joined_windows: int
    num_documents: int
    loss: float
    loss_interval: Interval | None
    loss_standard_error: float | None
    perplexity: float
    perplexity_interval: Interval | None
    buckets: tuple[PositionBucket, ...]
    losses: tuple[float, ...]
    documents: tuple[int, ...]
    against_reference: LossDifference | None


@dataclass(frozen=True)
class Losses:
    """What is kept of the losses of every token. by_bucket: [windows, buckets] mean loss; edges: position where each
    bucket starts, and where the last one stops."""

    by_bucket: NDArray[np.float64]
    edges: tuple[int, ...]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[buckets]: predicted tokens of a window; the one at position 0 is not."""
        sizes = np.diff(self.edges)
        sizes[0] -= 1
        return sizes

    @property
    def of_windows(self) -> NDArray[np.float64]:
        """[windows]: mean loss over all tokens."""
        return self.by_bucket @ self.num_tokens / self.num_tokens.sum()


@torch.inference_mode()
def token_losses(model: CausalModel, tokens: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Loss of every token but the first: [n, s] tokens to [n, s - 1] fp32, on the CPU. Logits exist for
    `chunk_tokens` positions at a time."""
    tokens = tokens.to(model.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    losses = []
    for index, logits in enumerate(model.logit_chunks(inputs, inputs.shape[1], chunk_tokens)):
        chunk_labels = labels[index * chunk_tokens : (index + 1) * chunk_tokens]
        losses.append(_losses(logits, chunk_labels))
    return torch.cat(losses).view(tokens.shape[0], -1).cpu()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[tokens] of logits [tokens, vocabulary], which are written over: as much memory again would cost more time than
    the arithmetic."""
    at_label = logits.gather(1, labels[:, None]).squeeze(1)
    largest = logits.amax(1)
    return logits.sub_(largest[:, None]).exp_().sum(1).log() + largest - at_label


def measure_losses(model: CausalModel, windows: Windows, tokens_per_batch: int, label: str) -> Losses:
    """Runs `windows`, as many rows at a time as fit in `tokens_per_batch` (at least one). `label` names the
    progress bar."""
    window = windows.tokens.shape[1]
    edges = bucket_edges(window)
    columns = [0, *(edge - 1 for edge in edges[1:])]  # column p - 1 is the token at position p
    batches = windows.tokens.split(max(1, tokens_per_batch // window))
    progress = tqdm(batches, desc=f"{model.name}: {label}", unit="batch", disable=None, leave=False)
    rows = []
    for batch in progress:
        losses = token_losses(model, batch).double()
        parts = [losses[:, start:stop].mean(dim=1) for start, stop in pairwise(columns)]
        rows.append(torch.stack(parts, dim=1))
    return Losses(torch.cat(rows).numpy(), edges)


def loss_by_position(losses: Losses, windows: Windows, seed: int, reference: Losses | None = None) -> LossByPosition:
    """The means of `losses`, and how they differ from those of `reference` on the same windows."""
    of_windows = losses.of_windows
    loss, num_windows = float(of_windows.mean()), len(of_windows)
    interval, buckets = _with_intervals(losses, windows, seed)
    difference = None
    if reference is not None:
        apart = Losses(losses.by_bucket - reference.by_bucket, losses.edges)
        difference = LossDifference(float(apart.of_windows.mean()), *_with_intervals(apart, windows, seed))
    return LossByPosition(
        window=windows.tokens.shape[1],
        num_windows=num_windows,
        num_joined_windows=windows.num_joined,
        num_documents=windows.num_documents,
        loss=loss,
        loss_interval=interval,
        loss_standard_error=None if num_windows == 1 else float(of_windows.std(ddof=1)) / math.sqrt(num_windows),
        perplexity=perplexity(loss),
        perplexity_interval=interval and Interval(perplexity(interval.low), perplexity(interval.high)),
        buckets=buckets,
        losses=tuple(of_windows.tolist()),
        documents=windows.documents,
        against_reference=difference,
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def bucket_edges(window: int) -> tuple[int, ...]:
    """Up to `NUM_BUCKETS` equal parts of the window, the last one perhaps shorter; the first predicts a token."""
    width = max(math.ceil(window / NUM_BUCKETS), 2)
    return (*range(0, window, width), window)


def _with_intervals(losses: Losses, windows: Windows, seed: int) -> tuple[Interval | None, tuple[PositionBucket, ...]]:
    """Of the mean loss, and of that of each bucket."""
    columns = np.column_stack([losses.of_windows, losses.by_bucket])
    intervals: Sequence[Interval | None]
    intervals = mean_interval(columns, windows.documents, seed=seed) or [None] * columns.shape[1]
    means = losses.by_bucket.mean(axis=0)
    buckets = tuple(
        PositionBucket(start, stop, float(mean), interval)
        for (start, stop), mean, interval in zip(pairwise(losses.edges), means, intervals[1:], strict=True)
    )
    return intervals[0], buckets
