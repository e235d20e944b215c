"""A model of transformers run layer by layer, and within a layer piece by piece, with what is inside its attention.

Memory holds one layer's weights and the values of one piece of a text; all texts' hidden states, and one text's keys
and values, are in temporary files. So neither the texts' length, nor their number, nor the model's depth counts: what
the engine would spread over ranks, for its taps, one process does here part after part.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longred_megatron.analysis.network import Network
from longred_megatron.analysis.token_file import TokenFile
from longred_megatron.kernels.blockwise_attention import blockwise_attention

PIECE_TOKENS = 512  # fewer take less memory, and more of a GPU's time


class LayerValues(NamedTuple):
    """Of the tokens `start` ... of one text, numbered from 0, in one layer, numbered from 1; good until the next are
    asked for.

    hidden: its output [p, hidden], after the final norm for the last layer. query: [heads, p, head_dim]. key, value:
    [key/value heads, p, head_dim]. Queries and keys are after RoPE and any norm of heads. scale: of the scores.
    rotation: cosines and sines of the positions, [p, head_dim] each.
    """

    layer: int
    text: int
    start: int
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    rotation: tuple[Tensor, Tensor]
    seen: "_Seen"

    @property
    def tokens(self) -> slice:
        """Which these are, of the text's."""
        return slice(self.start, self.start + len(self.hidden))

    def keys(self) -> Iterator[Tensor]:
        """Of the text's tokens up to the last of these, in blocks: [key/value heads, some tokens, head_dim]."""
        return self.seen.keys(self.tokens.stop)

    def before_rope(self, what: str) -> Tensor:
        """The query, key or value, without the rotation by its position, in fp32."""
        x: Tensor = getattr(self, what).float()
        if what == "value":
            return x
        cos, sin = (table.float() for table in self.rotation)
        first, second = x.chunk(2, dim=-1)
        return (x * cos - torch.cat((-second, first), dim=-1) * sin) / (cos.square() + sin.square())


class _Seen:
    """Keys and values of a text's tokens so far, of one layer; and the last piece's, and its queries."""

    start: int  # of the next piece
    heads: tuple[Tensor, Tensor, Tensor, float]  # of the last: queries, keys, values, the scale

    def __init__(self, keys: TokenFile, values: TokenFile) -> None:
        self._keys, self._values = keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[1, p, heads, head_dim] of all three [1, heads or key/value heads, p, head_dim]."""
        query, key, value = query[0], key[0], value[0]
        self.heads = query, key, value, scaling
        self._keys.write(self.start, key.transpose(0, 1))
        self._values.write(self.start, value.transpose(0, 1))
        stop = self.start + query.shape[1]
        blocks = zip(self.keys(stop), _blocks(self._values, stop), strict=True)
        return blockwise_attention(query, blocks, scaling, self.start).transpose(0, 1)[None]

    def keys(self, stop: int) -> Iterator[Tensor]:
        """Of the tokens before `stop`, in blocks."""
        return _blocks(self._keys, stop)


def _blocks(file: TokenFile, stop: int) -> Iterator[Tensor]:
    return (rows.transpose(0, 1) for rows in file.blocks(stop, PIECE_TOKENS))


def walk(
    network: Network, texts: Tensor, positions: Tensor | None = None, rotary: nn.Module | None = None
) -> Iterator[LayerValues]:
    """The layers of a network in order, in a layer the texts [n, s], of a text its tokens in pieces of `PIECE_TOKENS`;
    each computed when it is asked for. Walks of one network may go on in turns, while they are at the same layer.

    Causal, whatever the positions: transformers itself would take jumps in them for borders of documents.

    positions: [s], of every text; None: 0, 1, ... rotary: another RoPE than the model's, from `Network.rotary`.
    """
    (count, length), device = texts.shape, network.device
    rotary = rotary or network.rotary()  # a new one: dynamic RoPE remembers the longest call
    positions = torch.arange(length, device=device) if positions is None else positions.to(device)
    pieces = [slice(start, min(start + PIECE_TOKENS, length)) for start in range(0, length, PIECE_TOKENS)]
    last = network.architecture.num_layers
    with TokenFile() as hidden, TokenFile() as keys, TokenFile() as values:
        seen = _Seen(keys, values)
        for text, piece in product(range(count), pieces):
            embedded = network.embedding()(texts[text, piece].to(device))
            hidden.write(text * length + piece.start, embedded)
        for number, text, piece in product(range(1, last + 1), range(count), pieces):
            layer, seen.start = network.layer(number), piece.start
            x = hidden.read(text * length + piece.start, text * length + piece.stop)[None]
            # With the last position: RoPE may depend on the longest.
            ids = torch.cat((positions[piece], positions[-1:]))[None]
            cos, sin = (table[:, :-1] for table in rotary(x, position_ids=ids))
            x = layer(
                x, attention_mask=None, position_ids=ids[:, :-1], position_embeddings=(cos, sin), use_cache=False,
                attend=seen.attend,
            )[0]  # fmt: skip
            hidden.write(text * length + piece.start, x)
            out = network.norm(x) if number == last else x
            yield LayerValues(number, text, piece.start, out, *seen.heads, (cos[0], sin[0]), seen)
