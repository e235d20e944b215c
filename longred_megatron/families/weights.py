"""How a Megatron parameter is made of Hugging Face tensors, and the tensors of the parameter.

Rows and columns are cut, stacked and put back; no number is ever computed, so both directions are bitwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["embedding", "attention", "mlp", "norm", "head"]


class Source(Protocol):
    """A Hugging Face tensor that is read where it is indexed: a Tensor or a slice of a safetensors file."""

    def __getitem__(self, index: Any) -> "Tensor": ...


class Layout(Protocol):
    """How a parameter is split over the tensor-parallel group."""

    @property
    def split_dim(self) -> int | None:
        """The dim of the Hugging Face tensors of which each rank holds a part; None: each rank holds all."""

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        """The shard of tensor rank `rank` of `size`."""

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        """The Hugging Face tensors, from the shards of all tensor ranks in order."""


@dataclass(frozen=True)
class Replicated:
    """Every tensor rank holds the whole tensor."""

    split_dim: ClassVar[int | None] = None

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        return sources[0][:]

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        return [shards[0]]


@dataclass(frozen=True)
class Columns:
    """Row-parallel weights: a tensor rank holds a contiguous part of dim 1."""

    split_dim: ClassVar[int | None] = 1
    columns: int

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        local = self.columns // size
        return sources[0][:, rank * local : (rank + 1) * local]

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        return [_cat(shards, dim=1)]


@dataclass(frozen=True)
class Rows:
    """Column-parallel weights and biases: tensors of `rows` rows, stacked group by group.

    A group has an equal share of every tensor's rows. Query, key and value: a group is a key-value head with
    its query heads. Gate and up (`groups` None): a group is a tensor rank's share.
    """

    split_dim: ClassVar[int | None] = 0
    rows: tuple[int, ...]
    groups: int | None = None

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        local_groups = (self.groups or size) // size
        parts = []
        for source, rows in zip(sources, self.rows, strict=True):
            local = rows // size
            part = source[rank * local : (rank + 1) * local]
            parts.append(part.reshape(local_groups, local // local_groups, *part.shape[1:]))
        return _cat(parts, dim=1).flatten(0, 1)

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        groups = self.groups or len(shards)
        stacked = _cat(shards)
        parts = stacked.view(groups, -1, *stacked.shape[1:]).split([rows // groups for rows in self.rows], dim=1)
        return [part.reshape(-1, *stacked.shape[1:]) for part in parts]


@dataclass(frozen=True)
class FusedRows(Rows):
    """The same, of one tensor that has the blocks of `rows` rows one after another, as a fused `qkv_proj` has."""

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        (source,) = sources
        starts = accumulate(self.rows[:-1], initial=0)
        return super().split([_Block(source, start) for start in starts], rank, size)

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        return [_cat(super().join(shards))]


@dataclass(frozen=True)
class _Block:
    """The rows of `source` from `start` on, counted from 0."""

    source: Source
    start: int

    def __getitem__(self, index: slice) -> "Tensor":
        return self.source[self.start + index.start : self.start + index.stop]


@dataclass(frozen=True)
class PaddedRows:
    """Embedding and head: `rows` rows, of which each rank holds `local` (0: none is to be split), zeros at the end."""

    split_dim: ClassVar[int | None] = 0
    rows: int
    local: int = 0

    def split(self, sources: Sequence[Source], rank: int, size: int) -> "Tensor":
        start, end = (min(place * self.local, self.rows) for place in (rank, rank + 1))
        part = sources[0][start:end]
        return _cat((part, part.new_zeros(self.local - len(part), *part.shape[1:])))

    def join(self, shards: "Sequence[Tensor]") -> "list[Tensor]":
        return [_cat(shards)[: self.rows].contiguous()]


@dataclass(frozen=True)
class Rule:
    """One kind of Megatron parameter.

    `megatron`: its names, one for each specification (plain and Transformer Engine) that has its own; a layer's
    parameters are named from the layer on.
    `huggingface`: the tensors it is made of, name -> shape.
    `part`: of the model. The biases of attention and MLP are theirs; every norm, of queries and keys too, is "norm".
    """

    megatron: tuple[str, ...]
    huggingface: Mapping[str, tuple[int, ...]]
    layout: Layout
    part: Part

    def to_megatron(self, sources: Sequence[Source], tp_rank: int, tp_size: int) -> "Tensor":
        """The shard of tensor rank `tp_rank`, from tensors in the order of `huggingface`."""
        return self.layout.split(sources, tp_rank, tp_size)

    def to_huggingface(self, shards: "Sequence[Tensor]") -> "dict[str, Tensor]":
        """The tensors by name, from the shards of all tensor ranks in order."""
        return dict(zip(self.huggingface, self.layout.join(shards), strict=True))

    def within(self, prefix: str) -> "Rule":
        """The rule with `prefix` before the tensors' names."""
        return replace(self, huggingface={prefix + name: shape for name, shape in self.huggingface.items()})


def column_parallel(
    megatron: str,
    names: Sequence[str],
    rows: Sequence[int],
    columns: int,
    part: Part,
    *,
    bias: bool,
    groups: int | None = None,
) -> Iterator[Rule]:
    """A product split by its output: the rules of Megatron's module `megatron`, which stacks matrices.

    Args:
        names: of the Hugging Face modules: as many as `rows`, or one that has all the rows, block after block.
        rows, groups: see `Rows`.
        columns: of each matrix.
    """
    layout = Rows(tuple(rows), groups) if len(names) == len(rows) else FusedRows(tuple(rows), groups)
    counts = rows if len(names) == len(rows) else (sum(rows),)
    heights = dict(zip(names, counts, strict=True))
    yield Rule((f"{megatron}.weight",), {f"{n}.weight": (count, columns) for n, count in heights.items()}, layout, part)
    if bias:
        yield Rule((f"{megatron}.bias",), {f"{n}.bias": (count,) for n, count in heights.items()}, layout, part)


def row_parallel(megatron: str, name: str, shape: tuple[int, int], part: Part, *, bias: bool) -> Iterator[Rule]:
    """A product split by its input: the rules of Megatron's module `megatron`, of one (output, input) matrix."""
    yield Rule((f"{megatron}.weight",), {f"{name}.weight": shape}, Columns(shape[1]), part)
    if bias:
        yield Rule((f"{megatron}.bias",), {f"{name}.bias": shape[:1]}, Replicated(), part)


def norm(*megatron: str, name: str, size: int) -> Rule:
    """The weight of a norm over `size` elements; `megatron` has its names."""
    return Rule(megatron, {f"{name}.weight": (size,)}, Replicated(), "norm")


def _cat(tensors: "Sequence[Tensor]", dim: int = 0) -> "Tensor":
    import torch  # slow to import; a recipe is read, and refused, without it

    return torch.cat(list(tensors), dim=dim)
