"""A model of transformers run layer by layer, with what is inside each layer's attention.

Two models are compared in step: of each only one layer's values exist at a time. The engine's own taps would need both
models as Megatron chunks; these are the models as anyone loads them, and no more code.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.checkpoint.causal_model import load_causal_model

ATTENTION = "sdpa_with_heads"


class LayerValues(NamedTuple):
    """Of one layer, numbered from 1. hidden: its output [n, s, hidden], after the final norm for the last layer.

    query: [n, heads, s, head_dim]; key, value: [n, key/value heads, s, head_dim]; query and key after RoPE and any norm
    of heads. scale: of the scores. rotation: cosines and sines of the positions, [n or 1, s, head_dim] each.
    """

    layer: int
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    rotation: tuple[Tensor, Tensor]

    def before_rope(self, what: str) -> Tensor:
        """The query, key or value, without the rotation by its position."""
        x: Tensor = getattr(self, what)
        if what == "value":
            return x
        cos, sin = (table.float()[:, None] for table in self.rotation)
        x = x.float()
        first, second = x.chunk(2, dim=-1)
        return (x * cos - torch.cat((-second, first), dim=-1) * sin) / (cos.square() + sin.square())


def open_network(hf: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a Hugging Face folder, ready for `walk`. Raises UserError as `load_causal_model`."""
    network = load_causal_model(hf, dtype).to(device)
    network.config._attn_implementation = ATTENTION
    return network


def walk(
    network: Any, tokens: Tensor, positions: Tensor | None = None, rotary: nn.Module | None = None
) -> Iterator[LayerValues]:
    """The layers of a network of `open_network` on tokens [n, s], in order, each computed when it is asked for.

    Causal, whatever the positions: transformers itself would take jumps in them for borders of documents.

    positions: [n or 1, s]; None: 0, 1, ... rotary: another RoPE than the model's, from `other_rotary`.
    """
    base = network.base_model
    tokens = tokens.to(network.device)
    if positions is None:
        positions = torch.arange(tokens.shape[1])[None]
    positions = positions.to(network.device)
    hidden = base.embed_tokens(tokens)
    # A new one: dynamic RoPE remembers the longest call.
    tables = (rotary or other_rotary(network)).forward(hidden, position_ids=positions)
    for number, layer in enumerate(base.layers, start=1):
        heads: list[tuple[Tensor, Tensor, Tensor, float]] = []
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=tables,
            use_cache=False,
            heads=heads,
        )
        yield LayerValues(number, base.norm(hidden) if number == len(base.layers) else hidden, *heads.pop(), tables)


def other_rotary(network: Any, rope: dict[str, Any] | None = None, max_position_embeddings: int | None = None) -> Any:
    """The network's rotary module with other `rope_parameters` and window (tokens); None: its own, made anew."""
    config = copy.deepcopy(network.config)
    config.rope_parameters = dict(rope or config.rope_parameters)
    config.max_position_embeddings = max_position_embeddings or config.max_position_embeddings
    return type(network.base_model.rotary_emb)(config=config).to(network.device)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """transformers' own attention; the caller's list `heads` gets what goes into it."""
    more.pop("heads").append((query, key, value, scaling))
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
