"""Next-token cross-entropy straight from hidden states: the logits of all tokens never exist at once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_LABEL = -100  # torch's and transformers' ignore_index


@dataclass(frozen=True)
class _Shard:
    """This rank's rows of the vocabulary."""

    vocab_size: int
    first: int  # vocabulary id of the first row
    num_real: int  # rows that are entries of the vocabulary; those after them are padding
    group: dist.ProcessGroup | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
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

    Both gradients are made in the forward pass, while a chunk's logits are there: three matrix products in
    all, where recomputing the logits would take four. The loss is the same on all ranks of the group; the
    gradient of `hidden` is this rank's partial sum, to be summed over the group by the caller. Can be
    differentiated once.

    `chunk_tokens` bounds the working memory to about 6 bytes (bf16) x chunk_tokens x vocab_local: 0.8 GB for
    1024 tokens and 128K entries, less than the weight itself. Fewer tokens make the matrix products too small
    for a GPU, and every chunk reads and writes the fp32 weight gradient once.

    Raises ValueError when the shards together have fewer rows than `vocab_size`.
    """
    rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    rows = weight.shape[0]
    if rows * num_ranks < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} exceeds the {num_ranks} x {rows} rows of the output weight; "
            "pad the weight to a multiple of the tensor-parallel size"
        )
    first = rank * rows
    shard = _Shard(vocab_size, first, min(max(vocab_size - first, 0), rows), group)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearCrossEntropy.apply(hidden, weight, labels, shard, chunk_tokens, *needs)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: _Shard,
        chunk_tokens: int,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32 until the backward pass has scaled it: rounded to the weight's dtype once.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            chunk_loss, grad_logits = _chunk_loss(
                hidden[chunk] @ weight.t(), labels[chunk], shard, dtype, needs_hidden or needs_weight
            )
            loss += chunk_loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chunk]
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a second backward pass over the same graph is refused by autograd's version check.
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk_loss(
    logits: Tensor, labels: Tensor, shard: _Shard, dtype: torch.dtype, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and its gradient by `logits` [chunk, vocab_local] in their dtype (else empty).

    With m the largest logit of the whole vocabulary, s = sum over the whole vocabulary of exp(logit - m):
        loss = sum over labelled tokens of log s - (logit[label] - m)
        gradient = exp(logit - m) / s - (1 at the label), 0 where there is no label.
    """
    logits[:, shard.num_real :] = -torch.inf
    maximum = logits.amax(-1).to(dtype)
    if shard.group is not None:
        # Tensor-parallel group: its ranks hold the other logits of these tokens.
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
    logits_dtype, logits = logits.dtype, logits - maximum.unsqueeze(1)

    has_label = labels != NO_LABEL
    column = labels - shard.first
    is_here = (column >= 0) & (column < shard.num_real)
    at_label = torch.arange(len(labels), device=labels.device), column.clamp(0, logits.shape[1] - 1)
    label_logit = torch.where(is_here, logits[at_label], 0)
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(-1), label_logit])
    if shard.group is not None:
        # Tensor-parallel group: the rest of the softmax's sum; and one of its ranks has the label's logit.
        dist.all_reduce(sums, group=shard.group)
    denominator, label_logit = sums
    is_id = (labels >= 0) & (labels < shard.vocab_size)
    token_loss = torch.where(is_id, denominator.log() - label_logit, torch.inf)
    loss = torch.where(has_label, token_loss, 0).sum()
    if not needs_gradient:
        return loss, exponentials.new_empty(0)

    exponentials[at_label] -= torch.where(is_here, denominator, 0)
    gradient = exponentials.div_(denominator.unsqueeze(1)).to(logits_dtype)
    return loss, gradient.masked_fill_(~has_label.unsqueeze(1), 0)
