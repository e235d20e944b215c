"""Intervals against published values, plain references, and their own promise: 95 of 100 hold the true value."""

import math

import numpy as np
import pytest

from longred_megatron.evaluation.intervals import (
    Interval,
    combined_interval,
    difference_interval,
    mean_interval,
    score_interval,
    share_interval,
    student_quantile,
)


def test_wilson_as_published() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, number, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = share_interval(hits / number, number)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert share_interval(1.0, 12).high == 1.0 and 0.7 < share_interval(1.0, 12).low < 0.8


@pytest.mark.parametrize(("freedom", "published"), [(1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_students_t(freedom: int, published: float) -> None:
    assert student_quantile(freedom) == pytest.approx(published, rel=1e-3)


def test_mean_equals_a_plain_bootstrap() -> None:
    """The same clusters drawn one by one in a loop; two columns; rows with weights."""
    rng = np.random.default_rng(1)
    clusters = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9])
    values, weights = rng.normal(size=(14, 2)), rng.integers(1, 4, 14)
    found = mean_interval(values, clusters, weights)
    assert found is not None
    means = []
    for _ in range(20_000):
        rows = np.concatenate([np.flatnonzero(clusters == drawn) for drawn in rng.integers(0, 10, 10)])
        means.append((values[rows] * weights[rows, None]).sum(0) / weights[rows].sum())
    # The levels for ten clusters: a normal tail at sqrt(10 / 9) * 2.262.
    tail = 0.5 * math.erfc(math.sqrt(10 / 9) * 2.262 / math.sqrt(2))
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    width = high - low
    assert [each.low for each in found] == pytest.approx(low, abs=0.05 * width.max())
    assert [each.high for each in found] == pytest.approx(high, abs=0.05 * width.max())


def test_it_is_seeded_and_does_not_ask_what_a_cluster_is_called() -> None:
    values = np.random.default_rng(0).normal(size=(20, 1))
    first = mean_interval(values, range(20))
    assert first == mean_interval(values, range(100, 120)) != mean_interval(values, range(20), seed=1)
    assert mean_interval(values, [7] * 20) is None


def held(intervals: list[Interval | None], truth: float) -> float:
    return float(np.mean([each is not None and each.low <= truth <= each.high for each in intervals]))


@pytest.mark.parametrize("num_documents", [12, 40])
def test_documents_are_covered_and_windows_alone_are_not(num_documents: int) -> None:
    """Each document has its own level and one to four windows: 95 % hold the true mean; with every window its own
    cluster, far fewer do."""
    rng = np.random.default_rng(num_documents)
    right, wrong = [], []
    for _ in range(200):
        documents = np.repeat(np.arange(num_documents), rng.integers(1, 5, num_documents))
        values = (rng.normal(size=num_documents)[documents] + 0.3 * rng.normal(size=len(documents)))[:, None]
        for clusters, found in ((documents, right), (np.arange(len(documents)), wrong)):
            intervals = mean_interval(values, clusters)
            found.append(intervals[0] if intervals else None)
    assert 0.92 <= held(right, 0.0) <= 0.98
    assert held(wrong, 0.0) < 0.85


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_shares_are_covered(share: float) -> None:
    rng = np.random.default_rng(0)
    assert 0.92 <= held([score_interval(rng.random(60) < share) for _ in range(2000)], share) <= 0.985


def test_scores_between_zero_and_one_are_covered() -> None:
    rng = np.random.default_rng(0)
    assert 0.92 <= held([score_interval(rng.binomial(4, 0.8, 40) / 4) for _ in range(200)], 0.8) <= 0.98
    assert score_interval([0.5]) is None


@pytest.mark.parametrize("parts", [1, 4])
def test_differences_on_the_same_prompts_are_covered_and_narrower(parts: int) -> None:
    """Prompts are hard or easy for both models, so that the paired interval is narrower than two apart."""
    rng = np.random.default_rng(parts)
    intervals, apart = [], []
    for _ in range(200):
        ease = rng.choice([0.05, 0.95], 60)
        ours, theirs = (rng.binomial(parts, ease * factor) / parts for factor in (1.0, 0.8))
        intervals.append(difference_interval(ours, theirs))
        each = [score_interval(scores) for scores in (ours, theirs)]
        apart.append(math.hypot(*(one.high - one.low for one in each if one)))
    assert 0.92 <= held(intervals, 0.5 * 0.2) <= 0.985
    assert np.mean([each.high - each.low for each in intervals if each]) < 0.75 * np.mean(apart)


def test_models_that_agree_on_few_prompts_may_still_differ() -> None:
    few, many = (difference_interval([1.0] * n, [1.0] * n) for n in (10, 1000))
    assert few and many and few.low < -0.2 and few.high > 0.2 and -0.01 < many.low < 0 < many.high < 0.01


def test_the_mean_of_several_tasks() -> None:
    found = combined_interval([0.5, 0.9], [Interval(0.4, 0.6), Interval(0.8, 0.95)])
    assert (found.low, found.high) == pytest.approx((0.7 - 0.5 * math.sqrt(0.02), 0.7 + 0.5 * math.sqrt(0.0125)))
