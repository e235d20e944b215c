"""A loss of an output layer's logits straight from hidden states: the logits of all tokens never exist at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_LABEL = -100  # torch's and transformers' ignore_index

# (logits [chunk, vocab_local], the chunk's tokens, whether a gradient is needed) -> the chunk's summed loss, a scalar
# in arithmetic_dtype(logits); and its gradient by the logits in their dtype, anything if none is needed. The logits
# are the callee's to overwrite.
ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor]]


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: the dtype of softmax and sums."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class VocabularyShard:
    """A rank's rows of the vocabulary: rank r of `group` (None: one rank) holds those from r * rows on."""

    vocab_size: int
    first: int  # vocabulary id of the first row
    num_real: int  # rows that are entries of the vocabulary; those after them are padding
    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabularyShard":
        """This rank's, of `weight` [vocab_local, hidden]. Raises ValueError when the group has too few rows."""
        rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        rows = weight.shape[0]
        if rows * num_ranks < vocab_size:
            raise ValueError(
                f"vocab_size {vocab_size} exceeds the {num_ranks} x {rows} rows of the output weight; "
                "pad the weight to a multiple of the tensor-parallel size"
            )
        first = rank * rows
        return cls(vocab_size, first, min(max(vocab_size - first, 0), rows), rank, num_ranks, group)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """In place, over the tensor-parallel group; the caller says why."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)


def linear_loss(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk_tokens: int) -> Tensor:
    """Sum over chunks of `chunk_tokens` tokens of chunk_loss(hidden[chunk] @ weight.T), a scalar in fp32 (or fp64).

    hidden [tokens, hidden] and weight [vocab_local, hidden] have one dtype, in which the products run.

    Both gradients are made in the forward pass, while a chunk's logits are there: three matrix products in
    all, where recomputing the logits would take four. The gradient of `hidden` is that through this rank's
    logits alone. Can be differentiated once.

    Raises ValueError when chunk_tokens is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be at least 1")
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearLoss.apply(hidden, weight, chunk_loss, chunk_tokens, *needs)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        chunk_loss: ChunkLoss,
        chunk_tokens: int,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        dtype = arithmetic_dtype(hidden)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32 until the backward pass has scaled it: rounded to the weight's dtype once.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            one_loss, grad_logits = chunk_loss(hidden[chunk] @ weight.t(), chunk, needs_hidden or needs_weight)
            loss += one_loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chunk]
            del grad_logits  # before the next chunk's logits are there
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
        return grad_hidden, grad_weight, None, None, None, None
