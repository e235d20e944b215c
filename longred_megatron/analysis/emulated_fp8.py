"""FP8 emulated on any device: what the casts of Transformer Engine's recipes do to numbers, not how fast they are.

`precision.fp8: hybrid`: E4M3 in the forward pass, E5M2 for gradients. Products and sums are exact here (fp32): of the
hardware's shorter accumulation nothing is seen. The head and the embedding stay as they are, as in training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.precision import Scaling

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Elements that share a scale along a product's inner dim, and rows of a weight that share it as well.
BLOCKS = {"blockwise": (128, 128), "mxfp8": (32, 1)}
ATTENTION = "emulated_fp8"
QUERY_CHUNK = 256  # rows of scores that exist at once

# A matrix [m, n] as it enters products whose inner dim is n, and those whose inner dim is m.
Cast = Callable[[Tensor], tuple[Tensor, Tensor]]


class Casts(NamedTuple):
    """Of a linear layer: its input [tokens, in], weight [out, in] and its output's gradient [tokens, out]."""

    of_input: Cast
    of_weight: Cast
    of_gradient: Cast


def round_to_fp8(x: Tensor, largest: Tensor, number: torch.dtype = E4M3, power_of_two: bool = False) -> Tensor:
    """x as FP8 numbers with the scale that puts `largest` (broadcast) at the format's end; fp32."""
    end = torch.finfo(number).max
    scale = end / largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where((largest > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.float() * scale).clamp(-end, end).to(number).float() / scale


def tensorwise(x: Tensor, number: torch.dtype = E4M3) -> Tensor:
    """One scale for the tensor, from itself."""
    return round_to_fp8(x, x.abs().amax(), number)


def blocks(x: Tensor, width: int, height: int = 1, number: torch.dtype = E4M3) -> Tensor:
    """[m, n] with a power-of-two scale for every `height` x `width` elements."""
    m, n = x.shape
    padded = F.pad(x, (0, -n % width, 0, -m % height))
    tiles = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    cast = round_to_fp8(tiles, tiles.abs().amax((1, 3), keepdim=True), number, power_of_two=True)
    return cast.flatten(2, 3).flatten(0, 1)[:m, :n]


class Delayed:
    """One scale for the tensor, from the largest values of the casts before; the first has none before it."""

    def __init__(self, number: torch.dtype = E4M3) -> None:
        self.number = number
        self.largest: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        now = x.abs().amax()
        before = now if self.largest is None else self.largest
        self.largest = torch.maximum(before, now)
        return round_to_fp8(x, before, self.number)


def casts(scaling: Scaling) -> Casts:
    """New ones for every module."""
    if scaling in BLOCKS:
        width, height = BLOCKS[scaling]
        return Casts(_along_both(width, 1, E4M3), _along_both(width, height, E4M3), _along_both(width, 1, E5M2))
    if scaling == "delayed":
        return Casts(_once(Delayed(E4M3)), _once(Delayed(E4M3)), _once(Delayed(E5M2)))
    return Casts(_once(tensorwise), _once(tensorwise), _once(partial(tensorwise, number=E5M2)))


def _once(cast: Callable[[Tensor], Tensor]) -> Cast:
    """With one scale for the tensor, both products take the same numbers."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = cast(x)
        return rounded, rounded

    return both


def _along_both(width: int, height: int, number: torch.dtype) -> Cast:
    """Blocks lie along the inner dim of the product that takes them."""
    return lambda x: (blocks(x, width, height, number), blocks(x.t(), width, height, number).t())


class Emulator:
    """All linear layers of a network but its head with FP8 operands, and attention if asked for.

    Delayed scales are kept from one use to the next.
    """

    def __init__(self, network: nn.Module, scaling: Scaling, attention: bool) -> None:
        self._forwards = [(module, partial(_linear, module, casts(scaling))) for module in linear_layers(network)]
        self._config: Any = network.config
        self._attention = attention

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it, the network computes so, forward and backward; after it, as before."""
        before = self._config._attn_implementation
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[method-assign]
        if self._attention:
            ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
            self._config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before
            for module, _ in self._forwards:
                del module.forward


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """Those that training computes in FP8: all but the head."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    return [module for module in network.modules() if isinstance(module, nn.Linear) and module is not head]


def _linear(module: nn.Linear, casts: Casts, x: Tensor) -> Tensor:
    out = _Product.apply(x.flatten(0, -2), module.weight, casts).unflatten(0, x.shape[:-1])
    return out if module.bias is None else out + module.bias


class _Product(torch.autograd.Function):
    """x [tokens, in] @ weight.T, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, casts: Casts) -> Tensor:
        (x_in, x_tokens), (weight_in, weight_out) = casts.of_input(x), casts.of_weight(weight)
        ctx.save_for_backward(x_tokens, weight_out)
        ctx.cast, ctx.dtypes = casts.of_gradient, (x.dtype, weight.dtype)
        return (x_in @ weight_in.t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_out, of_tokens = ctx.cast(gradient)
        return (of_out @ weight).to(ctx.dtypes[0]), (of_tokens.t() @ x).to(ctx.dtypes[1]), None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Causal attention; every tensor has one scale, from itself.

    [batch, heads or kv_heads, tokens, head_dim] each -> [batch, tokens, heads, head_dim].
    """
    assert unused.get("sliding_window") is None, "families with sliding windows are refused before"
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return _Attention.apply(query, key, value, scaling).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """[batch, heads, tokens, head_dim] each. Queries, keys, values, probabilities and output in E4M3; the gradients of
    output, scores, queries, keys and values in E5M2."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (tensorwise(x) for x in (query, key, value))
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1])
        for rows in _chunks(q):
            scores = _scores(q, k, rows, scale)
            largest = scores.amax(-1, keepdim=True)
            shares = (scores - largest).exp()  # at most 1, as in the kernel, which divides at last
            total = shares.sum(-1, keepdim=True)
            out[:, :, rows] = round_to_fp8(shares, shares.new_ones(())) @ v[:, :, : rows.stop] / total
            sums[:, :, rows] = (largest + total.log())[..., 0]
        out = tensorwise(out)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale, ctx.dtype = scale, query.dtype
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        gradient = tensorwise(gradient, E5M2)
        mean = (gradient * out).sum(-1, keepdim=True)

        def of_scores(rows: slice) -> tuple[Tensor, Tensor]:
            shares = (_scores(q, k, rows, ctx.scale) - sums[:, :, rows, None]).exp()
            of_shares = gradient[:, :, rows] @ v[:, :, : rows.stop].transpose(2, 3)
            return shares, shares * (of_shares - mean[:, :, rows]) * ctx.scale

        largest = torch.stack([of_scores(rows)[1].abs().amax() for rows in _chunks(q)]).amax()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows in _chunks(q):
            shares, ds = of_scores(rows)
            ds = round_to_fp8(ds, largest, E5M2)
            dq[:, :, rows] = ds @ k[:, :, : rows.stop]
            dk[:, :, : rows.stop] += ds.transpose(2, 3) @ q[:, :, rows]
            dv[:, :, : rows.stop] += round_to_fp8(shares, shares.new_ones(())).transpose(2, 3) @ gradient[:, :, rows]
        return *(tensorwise(x, E5M2).to(ctx.dtype) for x in (dq, dk, dv)), None


def _chunks(q: Tensor) -> list[slice]:
    tokens = q.shape[2]
    return [slice(start, min(start + QUERY_CHUNK, tokens)) for start in range(0, tokens, QUERY_CHUNK)]


def _scores(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """[batch, heads, rows, rows.stop]: of keys up to the last of these rows; masked ones are -inf."""
    scores = q[:, :, rows] @ k[:, :, : rows.stop].transpose(2, 3) * scale
    seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(rows.start)
    return scores.masked_fill(~seen, -torch.inf)
