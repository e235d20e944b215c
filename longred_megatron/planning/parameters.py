"""Parameters of every model chunk on a rank, as Megatron's buffers hold them."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

from longred_megatron.families import Architecture
from longred_megatron.families.weights import Part, Rule
from longred_megatron.layout import Parallel

MATRICES: tuple[Part, ...] = ("mlp", "attention")  # and their biases, which are small
START_MULTIPLE, END_MULTIPLE = 64, 128  # elements; megatron/core/optimizer/param_layout.py


class Parameter(NamedTuple):
    """Of one rank: the part of the model it belongs to, and its elements there.

    partial: when a tensor rank has a part of its gradient alone, since it sees a part of the tokens, or of the heads.
    """

    part: Part
    elements: int
    partial: Literal["never", "under sequence parallelism", "always"]


class ChunkModel(NamedTuple):
    """What a model has on one chunk of a stage."""

    layers: range  # numbered from 1
    parameters: tuple[Parameter, ...]
    first: bool  # the model's first chunk, with the embedding
    last: bool  # the model's last, with final norm and head


def stage_chunks(
    model: Architecture,
    parallel: Parallel,
    stage: int,
    *,
    depth: int | None = None,
    head: bool = True,
    copy: bool = True,
) -> list[ChunkModel]:
    """The chunks of one pipeline stage, in order.

    Args:
        depth: layers that there are, from the first on; None: all of the model's.
        head: whether the model's head is there. copy: whether a tied head is the embedding, or a copy of it where that
            lies on another chunk; a frozen teacher's is always a tensor of its own.
    """
    chunks = parallel.for_depth(model.num_layers).chunk_layers(model.num_layers)
    depth = model.num_layers if depth is None else depth
    (embedding, norm, output), of_layer = _parameters(model, parallel.tensor)
    found = []
    for number in range(stage, len(chunks), parallel.pipeline):
        layers = range(chunks[number].start, max(chunks[number].start, min(chunks[number].stop, depth + 1)))
        first, last = number == 0, number == len(chunks) - 1
        outer = [embedding] if first else []
        outer += [norm] if last else []
        tied_here = first and model.tied_embeddings and copy
        outer += [output] if last and head and not tied_here else []
        found.append(ChunkModel(layers, (*of_layer * len(layers), *outer), first, last))
    return found


@cache  # a search for layouts asks ten thousand times
def _parameters(model: Architecture, tensor: int) -> tuple[list[Parameter], list[Parameter]]:
    """Those outside the layers, and those of each layer."""
    both = model.outer_rules(), model.layer_rules()
    outer, layer = ([Parameter(rule.part, _elements(rule, tensor), _partial(rule)) for rule in rules] for rules in both)
    return outer, layer


def _partial(rule: Rule) -> Literal["never", "under sequence parallelism", "always"]:
    if rule.layout.split_dim is not None:
        return "never"
    of_heads = any(name.endswith(("q_layernorm.weight", "k_layernorm.weight")) for name in rule.megatron)
    return "always" if of_heads else "under sequence parallelism"


def _elements(rule: Rule, tensor: int) -> int:
    """Of one tensor rank, with the vocabulary filled up to a multiple of the ranks."""
    shapes: Iterator[list[int]] = map(list, rule.huggingface.values())
    total = 0
    for shape in shapes:
        if rule.layout.split_dim is not None:
            shape[rule.layout.split_dim] = -(-shape[rule.layout.split_dim] // tensor)
        total += math.prod(shape)
    return total


def elements(chunks: Sequence[ChunkModel], parts: Collection[Part] | None = None) -> int:
    """Of all parameters of these parts; None: of all parts."""
    return sum(p.elements for chunk in chunks for p in chunk.parameters if parts is None or p.part in parts)


def partial_gradients(chunks: Sequence[ChunkModel], parts: Collection[Part] | None, sequence: bool) -> int:
    """Elements of trained parameters whose gradients the tensor ranks sum. parts: those trained; None: all."""
    wanted = ("always", "under sequence parallelism") if sequence else ("always",)
    trained = (p for chunk in chunks for p in chunk.parameters if parts is None or p.part in parts)
    return sum(p.elements for p in trained if p.partial in wanted)


def buffer_elements(chunks: Sequence[ChunkModel], parts: Collection[Part] | None, num_ranks: int) -> int:
    """Of the buffers that Megatron's data-parallel wrapper makes of trained parameters: a parameter begins at a
    multiple of 64 elements, and a chunk's buffer divides over `num_ranks` data-parallel ranks."""
    total = 0
    for chunk in chunks:
        own = 0
        for parameter in chunk.parameters:
            if parts is None or parameter.part in parts:
                own = -(-own // START_MULTIPLE) * START_MULTIPLE + parameter.elements
        multiple = math.lcm(num_ranks, END_MULTIPLE)
        total += -(-own // multiple) * multiple
    return total
