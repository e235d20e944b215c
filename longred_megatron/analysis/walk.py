"""A model of transformers run layer by layer, and within a layer piece by piece, with what is inside its attention.

Two models are compared in step. Of each, memory holds one layer's hidden states, keys and values of a whole text; all
else, such as a layer's inner values, exists for a piece of the text at a time. The engine's own taps would need both
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

ATTENTION = "sdpa_on_all_seen"
PIECE_TOKENS = 512  # fewer take less memory, and more of a GPU's time


class LayerValues(NamedTuple):
    """Of the tokens `start` ... of one layer, numbered from 1; good until the next are asked for.

    hidden: its output [n, p, hidden], after the final norm for the last layer. query: [n, heads, p, head_dim]. keys: of
    the tokens before too, [n, key/value heads, start + p, head_dim]. value: [n, key/value heads, p, head_dim]. Queries
    and keys are after RoPE and any norm of heads. scale: of the scores. rotation: cosines and sines of the positions,
    [n or 1, p, head_dim] each.
    """

    layer: int
    start: int
    hidden: Tensor
    query: Tensor
    keys: Tensor
    value: Tensor
    scale: float
    rotation: tuple[Tensor, Tensor]

    @property
    def tokens(self) -> slice:
        """Which these are, of all."""
        return slice(self.start, self.start + self.hidden.shape[1])

    @property
    def key(self) -> Tensor:
        """Of these tokens, [n, key/value heads, p, head_dim]."""
        return self.keys[:, :, self.start :]

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


class _Seen:
    """Keys and values of one layer's tokens so far, in memory that the next layer uses again; and the last queries."""

    start: int  # of the next piece
    heads: tuple[Tensor, Tensor, Tensor, float]  # of the last: queries, all keys, its values, the scale

    def __init__(self, length: int) -> None:
        self._length = length
        self._kept: tuple[Tensor, ...] = ()

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        """transformers' own attention, of the queries on all keys up to their own."""
        if not self._kept:
            self._kept = tuple(x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key, value))
        stop = self.start + query.shape[2]
        for kept, x in zip(self._kept, (key, value), strict=True):
            kept[:, :, self.start : stop] = x
        keys, values = (kept[:, :, :stop] for kept in self._kept)
        self.heads = query, keys, value, scaling
        if self.start:  # otherwise it is causal without a mask
            mask = query.new_full((1, 1, query.shape[2], stop), -torch.inf).triu_(self.start + 1)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **more)


def walk(
    network: Any, tokens: Tensor, positions: Tensor | None = None, rotary: nn.Module | None = None
) -> Iterator[LayerValues]:
    """The layers of a network of `open_network` on tokens [n, s], in order, of each its tokens in pieces of
    `PIECE_TOKENS`; each computed when it is asked for.

    Causal, whatever the positions: transformers itself would take jumps in them for borders of documents.

    positions: [n or 1, s]; None: 0, 1, ... rotary: another RoPE than the model's, from `other_rotary`.
    """
    base = network.base_model
    tokens = tokens.to(network.device)
    if positions is None:
        positions = torch.arange(tokens.shape[1])[None]
    positions = positions.to(network.device)
    hidden = base.embed_tokens(tokens)  # overwritten by each layer's output
    # A new one: dynamic RoPE remembers the longest call.
    tables = (rotary or other_rotary(network)).forward(hidden, position_ids=positions)
    seen = _Seen(tokens.shape[1])
    for number, layer in enumerate(base.layers, start=1):
        for start in range(0, tokens.shape[1], PIECE_TOKENS):
            piece = slice(start, start + PIECE_TOKENS)
            seen.start, rotation = start, (tables[0][:, piece], tables[1][:, piece])
            hidden[:, piece] = layer(
                hidden[:, piece],
                attention_mask=None,
                position_ids=positions[:, piece],
                position_embeddings=rotation,
                use_cache=False,
                seen=seen,
            )
            out = hidden[:, piece]
            yield LayerValues(
                number, start, base.norm(out) if number == len(base.layers) else out, *seen.heads, rotation
            )


def whole_layers(pieces: Iterator[LayerValues], length: int) -> Iterator[LayerValues]:
    """The layers of `walk` on texts of `length` tokens, all tokens of a layer at once."""
    kept: list[LayerValues] = []
    for piece in pieces:
        kept.append(piece)
        if piece.tokens.stop == length:
            hidden, query, value = (
                torch.cat([getattr(x, what) for x in kept], -2) for what in ("hidden", "query", "value")
            )
            cos, sin = (torch.cat(tables, 1) for tables in zip(*(x.rotation for x in kept), strict=True))
            yield LayerValues(piece.layer, 0, hidden, query, piece.keys, value, piece.scale, (cos, sin))
            kept.clear()


def other_rotary(network: Any, rope: dict[str, Any] | None = None, max_position_embeddings: int | None = None) -> Any:
    """The network's rotary module with other `rope_parameters` and window (tokens); None: its own, made anew."""
    config = copy.deepcopy(network.config)
    config.rope_parameters = dict(rope or config.rope_parameters)
    config.max_position_embeddings = max_position_embeddings or config.max_position_embeddings
    return type(network.base_model.rotary_emb)(config=config).to(network.device)


def _attend(*arguments: Any, seen: _Seen, **more: Any) -> tuple[Tensor, None]:
    return seen.attend(*arguments, **more)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
