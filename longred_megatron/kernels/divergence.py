"""Divergence of a student's next-token distribution from a teacher's, straight from both models' hidden states.

With p_s, p_t = softmax(logits / temperature) of student and teacher, a token's loss is
    (1 - cross_entropy) * temperature^2 * D(p_t, p_s) + cross_entropy * (-log softmax(student logits)[label])
and the divergence D by its `direction`, with m = (p_t + p_s) / 2,
    "forward"         KL(p_t || p_s) = sum over entries of p_t * log(p_t / p_s),
    "reverse"         KL(p_s || p_t),
    "jensen_shannon"  1/2 KL(p_t || m) + 1/2 KL(p_s || m).
The sum over tokens divided by the number of labels N_i is one term of the step loss
    (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over tokens of loss_o(token).
temperature^2 keeps the size of D's gradient, which falls with 1 / temperature^2 (Hinton et al. 2015, arXiv 1503.02531,
section 2). `top_entries.py` has D over the teacher's likeliest entries alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from longred_megatron.kernels.cross_entropy import chunk_cross_entropy, linear_cross_entropy
from longred_megatron.kernels.linear_loss import (
    CHUNK_BYTES,
    NO_LABEL,
    ChunkLoss,
    VocabularyShard,
    arithmetic_dtype,
    linear_loss,
    summed_bytes,
)

Direction = Literal["forward", "reverse", "jensen_shannon"]

# A logit without probability. Finite, so that the difference of two is 0 and not NaN.
NO_PROBABILITY = -1e30


def working_bytes(num_tokens: float, local_entries: float, number_bytes: int) -> float:
    """Of a chunk, on a rank with so many tokens and entries of the vocabulary: three fp32 tensors, and the student's
    logits where these have fewer bytes a number."""
    chunk = min(CHUNK_BYTES, 4 * num_tokens * local_entries)
    return 3 * chunk + (chunk * number_bytes / 4 if number_bytes < 4 else 0)


def message_bytes(num_tokens: float, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks: of a token two largest logits, two sums of softmax, D and its gradient's
    sum."""
    return summed_bytes(num_tokens, 6, num_ranks)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    vocab_size: int,
    direction: Direction = "forward",
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens with a label of this module's loss, a scalar in fp32 (or fp64).

    - cross_entropy: in [0, 1]; at 1 there need be no teacher.
    - hidden [tokens, student_hidden] and weight [vocab_local, student_hidden] have one dtype, teacher_hidden
      [tokens, teacher_hidden] and teacher_weight [vocab_local, teacher_hidden] have one dtype: those of the
      products. Softmax, D and sums run in the student's, at least fp32.
    - labels [tokens]: -100 for no loss, else the next token's id, which only the cross-entropy looks at.
    - Both weights are this rank's shards: rank r of `group` (the tensor-parallel group; None: one rank) holds the
      rows from r * vocab_local on. Rows from `vocab_size` on are padding and take no probability.

    Divisor and weight in the step loss are the caller's. The loss is the same on all ranks of the group; the gradient
    of `hidden` is this rank's partial sum, to be summed over the group by the caller. The teacher gets none. Can be
    differentiated once; see `linear_loss`, also for `chunk_tokens`.

    Raises ValueError for settings out of range, a missing teacher, numbers of tokens or rows that differ, and fewer
    rows than `vocab_size`.
    """
    shard = VocabularyShard.of(weight, vocab_size, group)
    check_settings(hidden, labels, direction, temperature, cross_entropy)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, cross_entropy)
    if teacher_hidden is None or teacher_weight is None or cross_entropy == 1:
        return linear_cross_entropy(
            hidden, weight, labels, vocab_size=vocab_size, group=group, chunk_tokens=chunk_tokens
        )

    def divergence(student: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        teacher = scaled_logits(teacher_hidden[chunk] @ teacher_weight.t(), temperature, shard, student.dtype)
        return _all_entries(student, teacher, direction, shard)

    chunk_loss = mixed_loss(divergence, labels, temperature, cross_entropy, shard)
    return linear_loss(hidden, weight, chunk_loss, chunk_tokens)


def mixed_loss(
    divergence: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    labels: Tensor,
    temperature: float,
    cross_entropy: float,
    shard: VocabularyShard,
) -> ChunkLoss:
    """The loss of a chunk out of a divergence, which takes the student's logits / temperature (and may overwrite
    them) and the chunk's tokens, and returns each token's and its gradient by what it took."""

    def chunk_loss(logits: Tensor, chunk: slice, _: bool) -> tuple[Tensor, Tensor]:
        if cross_entropy:
            label_loss, label_gradient = chunk_cross_entropy(logits, labels[chunk], shard, True)
        student = scaled_logits(logits, temperature, shard, arithmetic_dtype(logits))
        token_loss, gradient = divergence(student, chunk)
        share = (1 - cross_entropy) * (labels[chunk] != NO_LABEL).to(token_loss.dtype)
        loss = temperature**2 * (share * token_loss).sum()
        # temperature^1: `gradient` is that by logits / temperature.
        gradient = torch.mul(gradient, temperature * share.unsqueeze(1), out=logits)
        if cross_entropy:
            loss += cross_entropy * label_loss
            gradient.add_(label_gradient, alpha=cross_entropy)
        return loss, gradient

    return chunk_loss


def scaled_logits(logits: Tensor, temperature: float, shard: VocabularyShard, dtype: torch.dtype) -> Tensor:
    """logits / temperature in `dtype`, without the padding's; in place where that is the dtype they have."""
    logits = logits.to(dtype)
    if temperature != 1:
        logits /= temperature
    logits[:, shard.num_real :] = NO_PROBABILITY
    return logits


def _all_entries(
    student: Tensor, teacher: Tensor, direction: Direction, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """D of each token [chunk], and its gradient by the student's logits [chunk, vocab_local]. Overwrites both."""
    _, log_sums = shift([student, teacher], shard)
    student -= log_sums[0].unsqueeze(1)
    teacher -= log_sums[1].unsqueeze(1)
    terms, weighted = divergence_terms(direction, student, teacher)
    sums = torch.stack([terms.sum(-1), weighted.sum(-1)])
    # Tensor-parallel group: its ranks hold the terms of the other entries.
    shard.all_reduce(sums)
    return sums[0], weighted.addcmul_(student.exp_(), sums[1].unsqueeze(1), value=-1)


def shift(logits: Sequence[Tensor], shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Subtracts from each model's logits [chunk, vocab_local], in place, their maximum over the whole vocabulary.

    Returns the maxima and the logs of sum over the whole vocabulary of exp(logit - maximum), each [models, chunk].
    """
    maxima = torch.stack([one.amax(1) for one in logits])
    # Tensor-parallel group: its ranks hold the other logits of these tokens.
    shard.all_reduce(maxima, dist.ReduceOp.MAX)
    for one, maximum in zip(logits, maxima, strict=True):
        one -= maximum.unsqueeze(1)
    scratch = torch.empty_like(logits[0])
    sums = torch.stack([torch.exp(one, out=scratch).sum(1) for one in logits])
    # Tensor-parallel group: the rest of the sums.
    shard.all_reduce(sums)
    return maxima, sums.log()


def divergence_terms(direction: Direction, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of D(p_t, p_s), elementwise from log-probabilities, and p_s * dD/dp_s. Overwrites log_t.

    dD/dp_s is given up to a constant, which probabilities that sum to 1 do not feel: the gradient by the student's
    logit j is p_s[j] * dD/dp_s[j] - p_s[j] * sum over i of p_s[i] * dD/dp_s[i].
    """
    if direction == "forward":
        p_t = log_t.exp()
        return log_t.sub_(log_s).mul_(p_t), p_t.neg_()
    p_s = log_s.exp()
    if direction == "reverse":
        terms = log_t.neg_().add_(log_s).mul_(p_s)
        return terms, terms
    log_m = torch.logaddexp(log_s, log_t).sub_(math.log(2))
    weighted = p_s.mul_(log_s - log_m).div_(2)
    return log_t.exp().mul_(log_t.sub_(log_m)).div_(2).add_(weighted), weighted


def check_settings(hidden: Tensor, labels: Tensor, direction: str, temperature: float, cross_entropy: float) -> None:
    """Raises ValueError for settings out of range, and numbers of tokens that differ."""
    _refuse(
        {
            f"direction {direction!r} is none of {', '.join(get_args(Direction))}": direction
            not in get_args(Direction),
            f"temperature {temperature} is not a positive number": not 0 < temperature < math.inf,
            f"cross_entropy {cross_entropy} is outside [0, 1]": not 0 <= cross_entropy <= 1,
            f"{len(hidden)} tokens have {len(labels)} labels": len(hidden) != len(labels),
        }
    )


def _check_teacher(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None, cross_entropy: float
) -> None:
    if teacher_hidden is None or teacher_weight is None:
        _refuse({"only cross_entropy 1 needs no teacher_hidden and teacher_weight": cross_entropy != 1})
        return
    counts = {
        "tokens": (len(hidden), len(teacher_hidden)),
        "rows of the output weight": (len(weight), len(teacher_weight)),
    }
    _refuse({f"the student has {a} {what}, the teacher {b}": a != b for what, (a, b) in counts.items()})


def _refuse(problems: dict[str, bool]) -> None:
    if any(problems.values()):
        raise ValueError("; ".join(message for message, is_wrong in problems.items() if is_wrong))
