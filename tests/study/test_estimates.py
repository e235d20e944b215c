"""Intervals against tables, closed forms and simulated studies."""

import math

import numpy as np
import pytest

from longred_megatron.study.estimates import differences, estimate


def test_one_seed_is_the_interval_of_a_plain_sample() -> None:
    values = np.array([[1.0, 2.0, 4.0, 7.0]])
    half = 3.182 * values.std(ddof=1) / 2
    found = estimate(values)
    assert found.mean == 3.5
    assert found.low == pytest.approx(3.5 - half, rel=1e-3) and found.high == pytest.approx(3.5 + half, rel=1e-3)


def test_seeds_alone_count_where_all_units_agree() -> None:
    values = np.repeat([[1.0], [2.0], [6.0]], 50, axis=1)
    half = 4.303 * values[:, 0].std(ddof=1) / math.sqrt(3)
    assert estimate(values).high == pytest.approx(3 + half, rel=1e-3)


def test_what_does_not_vary_has_no_interval() -> None:
    found = estimate(np.full((3, 4), 0.5))
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("of_seeds", "of_units"), [(5.0, 0.0), (0.0, 5.0), (0.3, 1.0), (0.0, 0.0)])
def test_95_of_100_intervals_hold_the_truth(of_seeds: float, of_units: float) -> None:
    """Crossed effects of seeds and units, and noise. With noise alone the interval is wider than it has to be."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        values = of_seeds * rng.normal(size=(3, 1)) + of_units * rng.normal(size=(1, 40)) + rng.normal(size=(3, 40))
        found = estimate(values)
        held += found.low <= 0 <= found.high
    assert 0.925 <= held / 400 <= (0.975 if 5 in (of_seeds, of_units) else 1)


def test_differences_pair_seeds_and_units() -> None:
    ours, theirs = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[1.0, 1.0], [2.0, 2.0]]
    assert differences(ours, theirs).tolist() == [[0, 1], [1, 2]]
    assert differences(ours, [[1.0, 0.0]]).tolist() == [[0, 2], [2, 4], [4, 6]]
