"""FP8 emulated on any device: what the casts of Transformer Engine's recipes do to numbers, not how fast they are.

Forward passes only. Products and sums are exact here (fp32): of the hardware's shorter accumulation, and of E5M2 in the
backward pass, nothing is seen. The head and the embedding stay as they are, as in training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.precision import Scaling

E4M3, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
# Elements that share a scale along a product's inner dim, and rows of a weight that share it as well.
BLOCKS = {"blockwise": (128, 128), "mxfp8": (32, 1)}
ATTENTION = "emulated_fp8"
QUERY_CHUNK = 256  # rows of scores that exist at once

Cast = Callable[[Tensor], Tensor]


def round_to_fp8(x: Tensor, largest: Tensor, power_of_two: bool = False) -> Tensor:
    """x as E4M3 numbers with the scale that puts `largest` (broadcast) at the format's end; fp32."""
    scale = LARGEST / largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(E4M3).float() / scale


def tensorwise(x: Tensor) -> Tensor:
    """One scale for the tensor, from itself."""
    return round_to_fp8(x, x.abs().amax())


def blocks(x: Tensor, width: int, height: int = 1) -> Tensor:
    """[..., n] with a power-of-two scale for every `width` elements; with a height, [m, n] and blocks of both."""
    *rows, size = x.shape
    flat = x.reshape(-1, size)
    padded = F.pad(flat, (0, -size % width, 0, -flat.shape[0] % height))
    tiles = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    cast = round_to_fp8(tiles, tiles.abs().amax((1, 3), keepdim=True), power_of_two=True)
    return cast.flatten(2, 3).flatten(0, 1)[: flat.shape[0], :size].reshape(*rows, size)


class Delayed:
    """One scale for the tensor, from the largest values of the casts before; the first has none before it."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        now = x.abs().amax()
        before = now if self.largest is None else self.largest
        self.largest = torch.maximum(before, now)
        return round_to_fp8(x, before)


def casts(scaling: Scaling) -> tuple[Cast, Cast]:
    """Of an input and of a weight [out, in], new ones for every module."""
    if scaling == "delayed":
        return Delayed(), Delayed()
    if scaling == "tensorwise":
        return tensorwise, tensorwise
    width, height = BLOCKS[scaling]
    return lambda x: blocks(x, width), lambda x: blocks(x, width, height)


class Emulator:
    """All linear layers of a network but its head with FP8 inputs and weights, and attention if asked for.

    Delayed scales are kept from one use to the next.
    """

    def __init__(self, network: nn.Module, scaling: Scaling, attention: bool) -> None:
        head = network.get_output_embeddings()  # type: ignore[operator]
        layers = (module for module in network.modules() if isinstance(module, nn.Linear) and module is not head)
        self._forwards = [(module, _linear(module, *casts(scaling))) for module in layers]
        self._config: Any = network.config
        self._attention = attention

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it, the network computes so; after it, as before."""
        before = self._config._attn_implementation
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[assignment, method-assign]
        if self._attention:
            ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
            self._config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before
            for module, _ in self._forwards:
                del module.forward


def _linear(module: nn.Linear, of_input: Cast, of_weight: Cast) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out = F.linear(of_input(x), of_weight(module.weight)).to(x.dtype)
        return out if module.bias is None else out + module.bias

    return forward


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Causal attention with queries, keys, values, probabilities and output in FP8, each with one scale.

    [batch, heads or kv_heads, tokens, head_dim] each -> [batch, tokens, heads, head_dim].
    """
    assert unused.get("sliding_window") is None, "families with sliding windows are refused before"
    groups = query.shape[1] // key.shape[1]
    q, k, v = (tensorwise(x) for x in (query, key, value))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    tokens, out = q.shape[2], torch.empty_like(q)
    for start in range(0, tokens, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, tokens)
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(2, 3) * scaling
        seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
        scores = scores.masked_fill(~seen, -torch.inf)
        shares = (scores - scores.amax(-1, keepdim=True)).exp()  # at most 1, as in the kernel, which divides at last
        total = shares.sum(-1, keepdim=True)
        out[:, :, start:stop] = round_to_fp8(shares, shares.new_ones(())) @ v[:, :, :stop] / total
    return tensorwise(out).to(query.dtype).transpose(1, 2).contiguous(), None
