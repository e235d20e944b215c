"""Next-token loss by position in the window."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from longred_megatron.evaluation.models import CHUNK_TOKENS, CausalModel
from longred_megatron.evaluation.texts import Windows

NUM_BUCKETS = 32


@dataclass(frozen=True)
class PositionBucket:
    """Mean loss (nats a token) of the tokens at positions start <= p < stop, counted from 0 in the window."""

    start: int
    stop: int
    loss: float


@dataclass(frozen=True)
class LossByPosition:
    """Mean next-token loss over windows of one length.

    loss = (1 / (windows * (window - 1))) * sum over windows and positions p >= 1 of -log P(token p | tokens
    before p), in nats; perplexity = exp(loss); loss_standard_error: of the mean over windows, None for a
    single one; num_joined_windows: cut from several short documents in a row.
    """

    window: int
    num_windows: int
    num_joined_windows: int
    loss: float
    loss_standard_error: float | None
    perplexity: float
    buckets: tuple[PositionBucket, ...]


@torch.inference_mode()
def token_losses(model: CausalModel, tokens: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Loss of every token but the first: [n, s] tokens to [n, s - 1] fp32, on the CPU. Logits exist for
    `chunk_tokens` positions at a time."""
    tokens = tokens.to(model.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    losses = []
    for index, logits in enumerate(model.logit_chunks(inputs, inputs.shape[1], chunk_tokens)):
        chunk_labels = labels[index * chunk_tokens : (index + 1) * chunk_tokens]
        losses.append(F.cross_entropy(logits, chunk_labels, reduction="none"))
    return torch.cat(losses).view(tokens.shape[0], -1).cpu()


def loss_by_position(model: CausalModel, windows: Windows, tokens_per_batch: int, label: str) -> LossByPosition:
    """Measures `windows`, as many rows at a time as fit in `tokens_per_batch` (at least one). `label` names
    the progress bar."""
    num_windows, window = windows.tokens.shape
    batches = windows.tokens.split(max(1, tokens_per_batch // window))
    progress = tqdm(batches, desc=f"{model.name}: {label}", unit="batch", disable=None, leave=False)
    losses = torch.cat([token_losses(model, batch) for batch in progress]).double()
    of_windows = losses.mean(dim=1)
    loss = of_windows.mean().item()
    return LossByPosition(
        window=window,
        num_windows=num_windows,
        num_joined_windows=windows.num_joined,
        loss=loss,
        loss_standard_error=None if num_windows == 1 else (of_windows.std() / math.sqrt(num_windows)).item(),
        perplexity=torch.tensor(loss, dtype=torch.float64).exp().item(),
        buckets=_buckets(losses.mean(dim=0)),
    )


def _buckets(by_position: Tensor) -> tuple[PositionBucket, ...]:
    """by_position: [window - 1], the loss of the tokens at positions 1 ... window - 1."""
    width = math.ceil((len(by_position) + 1) / NUM_BUCKETS)
    starts = range(0, len(by_position) + 1, width)
    buckets = []
    for start in starts:
        stop = min(start + width, len(by_position) + 1)
        part = by_position[max(start - 1, 0) : stop - 1]  # position 0 is never predicted
        if len(part):
            buckets.append(PositionBucket(start, stop, part.mean().item()))
    return tuple(buckets)
