"""Flat ranges of a tensor as boxes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from longred_megatron.checkpoint.optimizer_state import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    found = list(boxes(tuple(shape), start, stop))
    parts = [tensor[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in found]
    assert all(part.numel() for part in parts)
    assert torch.cat([torch.empty(0, dtype=torch.long), *map(torch.flatten, parts)]).tolist() == [*range(start, stop)]
    assert len(found) <= 2 * len(shape) - 1


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_start_of_one() -> None:
    assert list(boxes((4, 10), 7, 32)) == [((0, 7), (1, 3)), ((1, 0), (2, 10)), ((3, 0), (1, 2))]
