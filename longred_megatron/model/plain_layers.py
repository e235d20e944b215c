"""A layer's elementwise parts in plain torch, where there is no Transformer Engine: each in few passes over memory.

Their backward passes are written out. So they keep what they need and no more, which torch's own do not: a norm its
input and a number a token, a gate its input, a rotation nothing.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean of x^2 + eps) * weight over the last dim, in at least fp32.

    The weight has the mark that Megatron reads to sum its gradient over sequence-parallel ranks. With
    `layernorm_zero_centered_gamma`, as Transformer Engine's, it multiplies by 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        # In bf16 the sum would lose the weight's digits.
        return _RmsNorm.apply(x, 1 + self.weight.float() if self.zero_centered else self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm over one head's dims. Heads are split over tensor ranks with or without sequence parallelism,
    so each rank holds a part of the weight's gradient either way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


class SwiGlu(torch.nn.Module):
    """silu(first half) * second half of the last dim, as Megatron's MLP asks of an activation's module."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 x width] -> [..., width]."""
        return _SwiGlu.apply(x)


class Rotation(NamedTuple):
    """What RoPE turns each token's pairs by: [tokens, 1, 1, head_dim // 2] each, fp32."""

    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, table: Tensor) -> "Rotation":
        """Of angles as `rotary_table` gives them. Made once a micro-batch and chunk."""
        angles = table[..., : table.shape[-1] // 2]
        return cls(angles.cos(), angles.sin())

    def turn(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[tokens, 1, heads, head_dim], turned (the rotate-half convention), in `dtype`."""
        return _Turn.apply(x, *self, dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale: scale * (g * weight - n * mean of g * weight * n)."""
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(x.shape[-1])
        grad_x = torch.mul(gradient, weight.to(product.dtype), out=product)
        return grad_x.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(silu(gate), gradient, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return grad_x


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = x.dtype
        return _turned(x, cosines, sines, 1, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(gradient, cosines, sines, -1, ctx.dtype), None, None, None


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, direction: int, dtype: torch.dtype) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=dtype, device=x.device)
    ours, theirs = turned.chunk(2, dim=-1)
    torch.mul(first, cosines, out=ours).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=theirs).addcmul_(first, sines, value=direction)
    return turned
