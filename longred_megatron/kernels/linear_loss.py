"""A loss of an output layer's logits straight from hidden states: the logits of all tokens never exist at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_LABEL = -100  # torch's and transformers' ignore_index
# fp32 bytes of one [chunk, vocab_local] tensor: 523 tokens of 128,256 entries, and with the vocabulary on 8 ranks 4186.
# Enough rows to fill a GPU's matrix products, and for each chunk's reading and writing of the fp32 weight gradient to
# be little beside them (on a CPU, at 49,152 entries and width 576, 64 MiB take 1.2 times as long).
CHUNK_BYTES = 256 * 2**20

try:
    # apex's: cuBLAS with a 16-bit product and an fp32 sum. Only a GPU's Python has it (`device.GPU_PACKAGES`).
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32 as _add_product_of_apex
except ImportError:
    _add_product_of_apex = None

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


def summed_bytes(num_tokens: float, numbers: int, num_ranks: int) -> float:
    """What a rank sends where `num_ranks` sum so many fp32 numbers of each token, or take their largest, in a ring."""
    return 2 * (num_ranks - 1) / num_ranks * 4 * numbers * num_tokens


def linear_loss(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk_tokens: int | None = None) -> Tensor:
    """Sum over chunks of `chunk_tokens` tokens of chunk_loss(hidden[chunk] @ weight.T), a scalar in fp32 (or fp64).

    hidden [tokens, hidden] and weight [vocab_local, hidden] have one dtype, in which the products run.
    chunk_tokens: by default as many as CHUNK_BYTES holds.

    Both gradients are made in the forward pass, while a chunk's logits are there: three matrix products in
    all, where recomputing the logits would take four. The gradient of `hidden` is that through this rank's
    logits alone. That of `weight` is summed in fp32, and added in fp32 to `weight.main_grad` where Megatron's
    data-parallel wrapper has made one. Can be differentiated once.

    Raises ValueError when chunk_tokens is not positive.
    """
    chunk_tokens = tokens_of_chunk(weight, chunk_tokens)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearLoss.apply(hidden, weight, chunk_loss, chunk_tokens, *needs)


def tokens_of_chunk(weight: Tensor, chunk_tokens: int | None = None) -> int:
    """`chunk_tokens`, or as many as CHUNK_BYTES holds. Raises ValueError when it is not positive."""
    if chunk_tokens is None:
        return max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be at least 1")
    return chunk_tokens


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
        # fp32, as the backward pass has still to scale it. The first chunk's part is written, the others' are added.
        grad_weight = torch.empty_like(weight, dtype=dtype) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            one_loss, grad_logits = chunk_loss(hidden[chunk] @ weight.t(), chunk, needs_hidden or needs_weight)
            loss += one_loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[chunk], is_first=start == 0)
            del grad_logits  # before the next chunk's logits are there
        ctx.weight = weight
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
            grad_weight = _delivered(ctx.weight, grad_weight, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor, is_first: bool) -> None:
    """total [vocab_local, hidden] += grad_logits.T @ hidden, or = where it is the first.

    In one pass over `total` where a product can add to it.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden, beta=0 if is_first else 1)
    elif not hidden.is_cuda:
        product = grad_logits.t() @ hidden
        total.copy_(product) if is_first else total.add_(product)
    elif _add_product_of_apex is not None:
        if is_first:
            total.zero_()
        _add_product_of_apex(hidden, grad_logits, total)
    else:
        beta = 0 if is_first else 1
        torch.addmm(total, grad_logits.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)


def _delivered(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    """Hands gradient * factor (a scalar) over: to Megatron's fp32 sum of all micro-batches where there is one, else to
    autograd, and then it overwrites `gradient`.

    What autograd gets in the first case only says that the gradient is there, which starts the reduction of its bucket.
    Megatron leaves it out by `grad_added_to_main_grad`; but where the weight is the embedding's as well
    (`zero_out_wgrad`) it adds what autograd has summed, so that this part has to be zero.
    """
    if getattr(weight, "main_grad", None) is None:
        return gradient.mul_(factor).to(weight.dtype)
    weight.main_grad.addcmul_(gradient, factor)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    is_tied = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if is_tied else torch.empty_like(weight)
