"""Divergence from entries drawn from a teacher's distribution: few are needed, and none is left out on average.

The estimate (Sparse Logit Sampling, ACL 2025, arXiv 2503.16870) of KL(p_t || p_s) from n entries e drawn from p_t is
    1/n * sum over e of log p_t(e) - log p_s(e).
Its mean over draws, and that of its gradient p_s - 1/n * (how often each entry was drawn), are those of the divergence.
One estimate may be below 0. The loss is else that of `divergence.py`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from longred_megatron.kernels.divergence import check_settings, scaled_logits, shift
from longred_megatron.kernels.linear_loss import VocabularyShard, arithmetic_dtype, summed_bytes, tokens_of_chunk
from longred_megatron.kernels.top_entries import Entries, columns_here, linear_entries_loss

BELOW_ONE = 1 - 2**-23  # so that no rounding leads past the last entry


def message_bytes(num_tokens: float, n: int, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks for the loss: n logits of a token, its largest and its softmax's sum."""
    return summed_bytes(num_tokens, n + 2, num_ranks)


def choice_bytes(num_tokens: float, n: int, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks to draw a teacher's: its share, two sums, n entries in int64, and their
    log-probabilities."""
    return (num_ranks - 1) * 4 * num_tokens + summed_bytes(num_tokens, 2 + 3 * n, num_ranks)


@torch.no_grad()
def linear_drawn_entries(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Entries:
    """Entries drawn from softmax(hidden @ weight.T / temperature), one for each of `uniforms` [tokens, n].

    Each is the first entry up to which the probabilities add up to more than its uniform number in [0, 1), the same on
    all ranks. hidden [tokens, hidden], weight [vocab_local, hidden], group: as in `linear_distillation`.

    Raises ValueError when numbers of tokens differ, and for fewer rows than `vocab_size`.
    """
    if len(uniforms) != len(hidden):
        raise ValueError(f"{len(hidden)} tokens have {len(uniforms)} rows of uniform numbers")
    shard = VocabularyShard.of(weight, vocab_size, group)
    size, parts = tokens_of_chunk(weight, chunk_tokens), []
    for chunk, own in zip(hidden.split(size), uniforms.split(size), strict=True):
        logits = chunk @ weight.t()
        parts.append(_drawn(scaled_logits(logits, temperature, shard, arithmetic_dtype(logits)), own, shard))
    entries, log_probabilities = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Entries(entries, log_probabilities, vocab_size)


def _drawn(logits: Tensor, uniforms: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """entries and their log-probabilities [chunk, n], of logits [chunk, vocab_local], which it overwrites."""
    _, [log_sum] = shift([logits], shard)
    logits -= log_sum.unsqueeze(1)
    sums = logits.exp().cumsum(1)
    own = sums[:, -1].contiguous()
    ranks = [own]
    if shard.group is not None:
        ranks = [torch.empty_like(own) for _ in range(shard.num_ranks)]
        # Tensor-parallel group: how much of a token's probability lies on each of its ranks.
        dist.all_gather(ranks, own, group=shard.group)
    ends = torch.stack(ranks, 1).cumsum(1)
    wanted = uniforms.to(ends.dtype) * BELOW_ONE * ends[:, -1:]
    is_here = torch.searchsorted(ends, wanted, right=True) == shard.rank
    before = ends[:, shard.rank : shard.rank + 1] - own.unsqueeze(1)
    columns = torch.searchsorted(sums, wanted - before, right=True).clamp_(0, max(0, shard.num_real - 1))
    # Tensor-parallel group: one of its ranks has each.
    entries, log_probabilities = (columns + shard.first).where(is_here, 0), logits.gather(1, columns).where(is_here, 0)
    shard.all_reduce(entries)
    shard.all_reduce(log_probabilities)
    return entries.int(), log_probabilities


def linear_drawn_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher: Entries,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`linear_distillation` in direction forward, estimated from entries drawn at the same temperature.

    Raises ValueError as that does.
    """
    check_settings(hidden, labels, "forward", temperature, cross_entropy)
    return linear_entries_loss(
        hidden, weight, teacher, labels, _estimate, temperature, cross_entropy, group=group, chunk_tokens=chunk_tokens
    )


def _estimate(student: Tensor, entries: Tensor, log_t: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Of each token [chunk], and its gradient by the student's logits [chunk, vocab_local], which it overwrites."""
    columns, is_here = columns_here(entries, shard)
    _, [log_sum] = shift([student], shard)
    student -= log_sum.unsqueeze(1)
    log_s = student.gather(1, columns).where(is_here, 0)
    # Tensor-parallel group: one of its ranks has the student's logit of each.
    shard.all_reduce(log_s)
    share = torch.where(is_here, -1 / entries.shape[1], 0).to(student.dtype)
    return (log_t.to(log_s.dtype) - log_s).mean(1), student.exp_().scatter_add_(1, columns, share)
