"""Which part of a micro-batch's values a rank holds, and whole sequences out of the parts of all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from longred_megatron.objectives.base import Groups, Tap
from longred_megatron.parallel.context import cut_for_context_rank

HEADS = ("query", "key", "value")  # split over the tensor ranks by heads; they have all tokens
STATES = ("hidden", "attention_output")  # split by tokens, under sequence parallelism


@dataclass(frozen=True)
class Parts:
    """Of a micro-batch of `num_sequences` x `sequence_length` tokens, on the ranks that share it.

    whole_sequences: whether context ranks hold whole sequences. sequence: whether tensor ranks split hidden states.
    """

    num_sequences: int
    sequence_length: int
    whole_sequences: bool
    sequence: bool
    groups: Groups

    def tensor_axis(self, place: Tap) -> int | None:
        """The axis of a value [tokens, 1, ...] that the tensor ranks split; None: each has all of it."""
        if self.groups.tp.size() > 1:
            if place.what in HEADS:
                return 2
            if place.what in STATES and self.sequence:
                return 0
        return None

    def runs(self, place: Tap) -> Iterator[tuple[int, int, int]]:
        """(sequence, first row, stop) of neighbouring rows, in the order in which this rank holds them."""
        rows = self._context_rows(self.groups.cp.rank())
        if self.tensor_axis(place) == 0:
            rows = rows.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        is_first = (rows.diff() != 1) | (rows[1:] % self.sequence_length == 0)
        firsts = [0, *(is_first.nonzero().flatten() + 1).tolist(), len(rows)]
        for first, stop in pairwise(firsts):
            sequence, start = divmod(int(rows[first]), self.sequence_length)
            yield sequence, start, start + stop - first

    def own_heads(self, value: Tensor, place: Tap) -> Tensor:
        """Of values [tokens, 1, ...] of all heads, those of this tensor rank."""
        tp = self.groups.tp
        return value.chunk(tp.size(), dim=2)[tp.rank()] if self.tensor_axis(place) == 2 else value

    def whole(self, value: Tensor, place: Tap) -> Tensor:
        """[sequences, sequence_length, ...] out of every rank's [tokens, 1, ...], the same on all of them."""
        axis, tp, cp = self.tensor_axis(place), self.groups.tp, self.groups.cp
        if axis is not None:
            value = torch.cat(_gathered(value, tp), dim=axis)
        tokens = self.num_sequences * self.sequence_length
        found = value.new_empty(tokens, *value.shape[2:])
        for rank, part in enumerate(_gathered(value, cp)):
            found[self._context_rows(rank).to(value.device)] = part.squeeze(1)
        return found.unflatten(0, (self.num_sequences, self.sequence_length))

    def is_own(self, sequence: int) -> bool:
        """Whether it is this rank that writes a sequence: the ranks that share it take turns."""
        tp, cp = self.groups.tp, self.groups.cp
        return sequence % (tp.size() * cp.size()) == tp.rank() + tp.size() * cp.rank()

    def _context_rows(self, rank: int) -> Tensor:
        """The rows, counted over all sequences, that a context rank holds."""
        rows = torch.arange(self.num_sequences * self.sequence_length).view(self.num_sequences, -1)
        return cut_for_context_rank(rows, rank, self.groups.cp.size(), self.whole_sequences).reshape(-1)


def _gathered(value: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [value]
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts
