"""Divergence from a teacher's k likeliest entries: what is needed of the teacher is small, and can be kept.

The divergence is over k + 1 buckets: the teacher's k most probable entries of the whole vocabulary (of equal ones any,
but on all ranks the same) and one with all the rest of each model's probability. The loss is else that of
`divergence.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longred_megatron.kernels.divergence import (
    NO_PROBABILITY,
    Direction,
    check_settings,
    divergence_terms,
    mixed_loss,
    scaled_logits,
    shift,
)
from longred_megatron.kernels.linear_loss import (
    VocabularyShard,
    arithmetic_dtype,
    linear_loss,
    summed_bytes,
    tokens_of_chunk,
)


class Entries(NamedTuple):
    """Of each token a few entries of the whole vocabulary that say something of a teacher, the same on all ranks.

    entries: [tokens, k] int32. log_probabilities: theirs, fp32 or fp64: [tokens, k + 1] of the likeliest, last that of
    all others; [tokens, k] of drawn ones. vocab_size: of the vocabulary, without padding.
    """

    entries: Tensor
    log_probabilities: Tensor
    vocab_size: int

    def packed(self) -> Tensor:
        """Both as one [tokens, ...] int32, fp32's bits as they are: they belong together, also on a disk."""
        return torch.cat([self.entries, self.log_probabilities.float().view(torch.int32)], 1)

    @classmethod
    def unpacked(cls, packed: Tensor, number: int, vocab_size: int) -> "Entries":
        """Out of `packed`, of so many entries a token."""
        return cls(packed[:, :number], packed[:, number:].contiguous().view(torch.float32), vocab_size)


def message_bytes(num_tokens: float, k: int, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks for the loss: k logits of a token, its largest and its softmax's sum."""
    return summed_bytes(num_tokens, k + 2, num_ranks)


def choice_bytes(num_tokens: float, k: int, local_entries: int, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks to find a teacher's likeliest: its own in fp32 and int64, and two sums."""
    return (num_ranks - 1) * min(k, local_entries) * 12 * num_tokens + summed_bytes(num_tokens, 2, num_ranks)


@torch.no_grad()
def linear_top_entries(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Entries:
    """The k likeliest of softmax(hidden @ weight.T / temperature), chunk by chunk of tokens.

    hidden [tokens, hidden], weight [vocab_local, hidden], group: as in `linear_distillation`.

    Raises ValueError unless 1 <= k < vocab_size, and for fewer rows than `vocab_size`.
    """
    if not 1 <= k < vocab_size:
        raise ValueError(f"k {k} is outside 1 to {vocab_size - 1}, one less than the vocabulary")
    shard = VocabularyShard.of(weight, vocab_size, group)
    parts = []
    for chunk in hidden.split(tokens_of_chunk(weight, chunk_tokens)):
        logits = chunk @ weight.t()
        parts.append(_top_entries(scaled_logits(logits, temperature, shard, arithmetic_dtype(logits)), k, shard))
    entries, log_probabilities = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Entries(entries, log_probabilities, vocab_size)


def _top_entries(logits: Tensor, k: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Of logits [chunk, vocab_local], which it overwrites."""
    top, entries = logits.topk(min(k, logits.shape[1]))
    entries += shard.first
    if shard.group is not None:
        # Tensor-parallel group: any of its ranks may hold the largest logits.
        gathered = [[torch.empty_like(one) for _ in range(shard.num_ranks)] for one in (top, entries)]
        for parts, own in zip(gathered, (top, entries), strict=True):
            dist.all_gather(parts, own, group=shard.group)
        top, entries = (torch.cat(parts, 1) for parts in gathered)
    # A stable sort of the same numbers: all ranks choose the same entries, also among equal ones.
    top, chosen = (one[:, :k] for one in top.sort(dim=1, descending=True, stable=True))
    entries = entries.gather(1, chosen)
    columns, is_here = columns_here(entries, shard)
    logits.scatter_add_(1, columns, torch.where(is_here, NO_PROBABILITY, 0).to(logits.dtype))
    [maximum], [rest] = shift([logits], shard)
    log_probabilities = torch.cat([top - maximum.unsqueeze(1), rest.unsqueeze(1)], 1).log_softmax(1)
    return entries.int(), log_probabilities


def columns_here(entries: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Of entries [chunk, k], which columns of this rank's logits they are (else any), and whether they are here."""
    columns = entries.long() - shard.first
    is_here = (columns >= 0) & (columns < shard.num_real)
    return columns.where(is_here, 0), is_here


def linear_top_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher: Entries,
    labels: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`linear_distillation` from a teacher's likeliest entries at the same temperature.

    Raises ValueError as that does.
    """
    check_settings(hidden, labels, direction, temperature, cross_entropy)
    own = partial(_divergence, direction=direction)
    return linear_entries_loss(
        hidden, weight, teacher, labels, own, temperature, cross_entropy, group=group, chunk_tokens=chunk_tokens
    )


def linear_entries_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Entries,
    labels: Tensor,
    divergence: Callable[[Tensor, Tensor, Tensor, VocabularyShard], tuple[Tensor, Tensor]],
    temperature: float,
    cross_entropy: float,
    *,
    group: dist.ProcessGroup | None,
    chunk_tokens: int | None,
) -> Tensor:
    """The loss of `divergence.py` with a divergence from a chunk's entries and their log-probabilities.

    divergence: as `mixed_loss` takes it, of the student's logits [chunk, vocab_local], the two, and the shard.

    Raises ValueError when numbers of tokens differ.
    """
    if len(teacher.entries) != len(hidden):
        raise ValueError(f"the student has {len(hidden)} tokens, the teacher {len(teacher.entries)}")
    shard = VocabularyShard.of(weight, teacher.vocab_size, group)

    def of_chunk(student: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        return divergence(student, teacher.entries[chunk], teacher.log_probabilities[chunk], shard)

    chunk_loss = mixed_loss(of_chunk, labels, temperature, cross_entropy, shard)
    return linear_loss(hidden, weight, chunk_loss, chunk_tokens)


def _divergence(
    student: Tensor, entries: Tensor, log_t: Tensor, shard: VocabularyShard, direction: Direction
) -> tuple[Tensor, Tensor]:
    """D of each token [chunk], and its gradient by the student's logits [chunk, vocab_local], which it overwrites."""
    columns, is_here = columns_here(entries, shard)
    top = student.gather(1, columns).where(is_here, 0)
    # Tensor-parallel group: one of its ranks has the student's logit of each.
    shard.all_reduce(top)
    student.scatter_add_(1, columns, torch.where(is_here, NO_PROBABILITY, 0).to(student.dtype))
    [maximum], [log_sum] = shift([student], shard)
    log_s = torch.cat([top - maximum.unsqueeze(1), log_sum.unsqueeze(1)], 1).log_softmax(1)
    terms, weighted = divergence_terms(direction, log_s, log_t.to(log_s.dtype, copy=True))
    by_bucket = weighted - log_s.exp() * weighted.sum(1, keepdim=True)
    # An entry of the rest has its share of its bucket's gradient.
    gradient = student.sub_(log_sum.unsqueeze(1)).exp_().mul_(by_bucket[:, -1:])
    return terms.sum(1), gradient.scatter_add_(1, columns, by_bucket[:, :-1].where(is_here, 0))
