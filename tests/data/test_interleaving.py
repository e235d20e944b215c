import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longred_megatron.data.interleaving import BLOCK_SAMPLES, Interleaving

# SlimPajama's shares in LongReD's D1.
PAPER_WEIGHTS = [0.534, 0.266, 0.050, 0.043, 0.041, 0.034, 0.032]


def largest_deviation(weights: list[float], num_samples: int) -> float:
    """max over prefixes g and sets i of |samples of i among the first g - g * w_i / sum(w)|."""
    interleaving = Interleaving(weights)
    sets = np.array([interleaving[index][0] for index in range(num_samples)])
    given_samples = np.cumsum(np.eye(len(weights))[sets], axis=0)
    shares = np.array(weights) / sum(weights)
    return float(np.abs(given_samples - np.arange(1, num_samples + 1)[:, None] * shares).max())


@pytest.mark.parametrize(
    "weights", [PAPER_WEIGHTS, [0.9] + [0.01] * 10, [1, 1], [1 / 3] * 3, [5] + [1] * 30, [1e-9, 1.0]]
)
def test_proportions_hold_within_one_sample_for_every_prefix(weights):
    assert largest_deviation(weights, 5000) <= 1 - 1 / (2 * len(weights) - 2) + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=2, max_size=12))
def test_proportions_hold_for_any_weights(weights):
    assert largest_deviation(weights, 500) <= 1 - 1 / (2 * len(weights) - 2) + 1e-9


def test_each_set_gives_its_samples_one_after_the_other():
    interleaving = Interleaving(PAPER_WEIGHTS)
    next_samples = [0] * len(PAPER_WEIGHTS)
    for index in range(BLOCK_SAMPLES + 500):
        chosen, sample = interleaving[index]
        assert sample == next_samples[chosen]
        next_samples[chosen] += 1


def test_order_depends_on_neither_access_order_nor_unit():
    in_order = Interleaving(PAPER_WEIGHTS)
    expected = [in_order[index] for index in range(2 * BLOCK_SAMPLES)]
    shuffled = list(range(2 * BLOCK_SAMPLES))
    random.Random(0).shuffle(shuffled)
    other = Interleaving([4 * weight for weight in PAPER_WEIGHTS])  # a power of two: exactly the same shares
    assert {index: other[index] for index in shuffled} == dict(enumerate(expected))


def test_a_single_set_gives_everything():
    assert Interleaving([0.3])[123_456_789_012] == (0, 123_456_789_012)


def test_order_is_pinned():
    """A change here would change the data of runs that resume."""
    interleaving = Interleaving([5, 3, 2])
    assert [interleaving[index][0] for index in range(10)] == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
