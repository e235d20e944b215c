from itertools import pairwise

import numpy as np
import pytest

from longred_megatron.data import shuffle
from longred_megatron.data.shuffle import Shuffle, shuffled


def bits(seed: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([seed]))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4097, 20_000])
def test_every_number_comes_once(size: int) -> None:
    order = Shuffle(bits(size), size)
    assert sorted(order[place] for place in range(size)) == list(range(size))
    for outside in (-1, size):
        with pytest.raises(IndexError):
            order[outside]


def test_orders_are_as_if_drawn() -> None:
    """Over many seeds each number is equally often first, and next to each other; chi-square within 5 deviations."""
    size, seeds = 12, 6000
    firsts, steps, ascending = np.zeros(size), np.zeros(size), 0
    for seed in range(seeds):
        order = Shuffle(bits(seed), size)
        numbers = [order[place] for place in range(size)]
        firsts[numbers[0]] += 1
        steps[(numbers[1] - numbers[0]) % size] += 1
        ascending += sum(a < b for a, b in pairwise(numbers))
    for counts, cells in ((firsts, size), (steps[1:], size - 1)):
        chi_square = ((counts - seeds / cells) ** 2 / (seeds / cells)).sum()
        assert abs(chi_square - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1)), counts
    assert ascending / seeds == pytest.approx((size - 1) / 2, abs=0.1)


def test_neighbours_in_a_large_order_are_far_from_each_other() -> None:
    size = 10**12
    order = Shuffle(bits(7), size)
    numbers = np.array([order[place] for place in range(4000)], dtype=float) / size
    assert numbers.mean() == pytest.approx(0.5, abs=0.03) and numbers.var() == pytest.approx(1 / 12, abs=0.01)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.08
    assert np.abs(np.diff(numbers)).mean() == pytest.approx(1 / 3, abs=0.03)


def test_a_large_order_is_pinned_and_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Shuffle(bits(7), 10**12)
    assert [order[place] for place in (0, 1, 10**12 - 1)] == [915482141626, 896371056748, 151313492154]
    assert isinstance(shuffled(bits(7), 100), np.ndarray)
    monkeypatch.setattr(shuffle, "MOST_STORED", 99)
    assert isinstance(shuffled(bits(7), 100), Shuffle)
