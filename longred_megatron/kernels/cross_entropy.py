"""Next-token cross-entropy straight from hidden states."""

import torch
import torch.distributed as dist
from torch import Tensor

from longred_megatron.kernels.linear_loss import (
    CHUNK_BYTES,
    NO_LABEL,
    VocabularyShard,
    arithmetic_dtype,
    linear_loss,
    summed_bytes,
)


def working_bytes(num_tokens: float, local_entries: float, number_bytes: int) -> float:
    """Of a chunk, on a rank with so many tokens and entries of the vocabulary: its logits in fp32, and where they have
    fewer bytes a number, these too."""
    chunk = min(CHUNK_BYTES, 4 * num_tokens * local_entries)
    return chunk + (chunk * number_bytes / 4 if number_bytes < 4 else 0)


def message_bytes(num_tokens: float, num_ranks: int) -> float:
    """Sent by each of the vocabulary's ranks: a token's largest logit, the sum of its softmax and its label's logit."""
    return summed_bytes(num_tokens, 3, num_ranks)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens with a label of -log softmax(hidden @ weight.T)[label], a scalar in fp32 (or fp64).

    - hidden [tokens, hidden] and weight [vocab_local, hidden] have one dtype, in which the products run;
      softmax and sums run in fp32.
    - labels [tokens]: ids in [0, vocab_size), or -100 for no loss; any other makes the loss infinite.
    - weight is this rank's shard: rank r of `group` (the tensor-parallel group; None: one rank) holds the
      rows from r * vocab_local on. Rows from `vocab_size` on are padding and take no probability.

    This is LongReD's L_long (Eq. 18); divided by the number of labels N_i it is one term of the step loss
        (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over tokens of loss_o(token).
    Divisor and weight are the caller's.

    The loss is the same on all ranks of the group; the gradient of `hidden` is this rank's partial sum, to be
    summed over the group by the caller. Can be differentiated once; see `linear_loss`, also for `chunk_tokens`.

    Raises ValueError when the shards together have fewer rows than `vocab_size`.
    """
    shard = VocabularyShard.of(weight, vocab_size, group)

    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> tuple[Tensor, Tensor]:
        return chunk_cross_entropy(logits, labels[chunk], shard, needs_gradient, logits)

    return linear_loss(hidden, weight, chunk_loss, chunk_tokens)


def chunk_cross_entropy(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, needs_gradient: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and its gradient by `logits` [chunk, vocab_local] in their dtype (else empty).

    With m the largest logit of the whole vocabulary, s = sum over the whole vocabulary of exp(logit - m):
        loss = sum over labelled tokens of log s - (logit[label] - m)
        gradient = exp(logit - m) / s - (1 at the label), 0 where there is no label.
    out: where the gradient is written, which may be `logits`; without it, of these only the padding is overwritten.
    """
    logits[:, shard.num_real :] = -torch.inf
    maximum = logits.amax(-1).to(arithmetic_dtype(logits))
    # Tensor-parallel group: its ranks hold the other logits of these tokens.
    shard.all_reduce(maximum, dist.ReduceOp.MAX)
    out = torch.empty_like(logits) if out is None else out
    shifted = torch.sub(logits, maximum.unsqueeze(1), out=out if out.dtype == maximum.dtype else None)

    has_label = labels != NO_LABEL
    column = labels - shard.first
    is_here = (column >= 0) & (column < shard.num_real)
    at_label = torch.arange(len(labels), device=labels.device), column.clamp(0, logits.shape[1] - 1)
    label_logit = torch.where(is_here, shifted[at_label], 0)
    exponentials = shifted.exp_()
    sums = torch.stack([exponentials.sum(-1), label_logit])
    # Tensor-parallel group: the rest of the softmax's sum; and one of its ranks has the label's logit.
    shard.all_reduce(sums)
    denominator, label_logit = sums
    is_id = (labels >= 0) & (labels < shard.vocab_size)
    token_loss = torch.where(is_id, denominator.log() - label_logit, torch.inf)
    loss = torch.where(has_label, token_loss, 0).sum()
    if not needs_gradient:
        return loss, exponentials.new_empty(0)

    share = torch.where(has_label, 1 / denominator, 0)
    at_the_label = share * (exponentials[at_label] - torch.where(is_here, denominator, 0))
    gradient = torch.mul(exponentials, share.unsqueeze(1), out=out)
    gradient[at_label] = at_the_label.to(gradient.dtype)
    return loss, gradient
