"""The table of a study: what stands in its cells."""

import pytest

from longred_megatron.evaluation.intervals import share_interval, student_quantile
from longred_megatron.study.measure import Measured
from longred_megatron.study.results import ORIGINAL, changes, table, verdict
from longred_megatron.study.settings import Ordering


def measured(scores: list[float]) -> Measured:
    return Measured("key", short=[2.0, 2.5], long=[3.0, 3.5], prompts={64: scores}, similarity=None)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_share_that_does_not_vary_has_wilson_s_interval(share: float, seeds: int) -> None:
    rows = {ORIGINAL: [measured([share] * 40)] * seeds}
    found, wanted = changes(rows, ORIGINAL)["@64"], share_interval(share, 40)
    assert (found.mean, found.low, found.high) == (share, wanted.low, wanted.high)
    assert table(rows)[1][6] == ("0% (0% to 9%)" if share == 0 else "100% (91% to 100%)")


def test_a_share_stays_within_0_and_1() -> None:
    rows = {ORIGINAL: [measured([1.0] * 39 + [0.0]), measured([1.0] * 40)]}
    found = changes(rows, ORIGINAL)["@64"]
    assert found.low < found.mean < found.high == 1.0


def test_two_that_answer_alike_are_not_known_to_be_equal() -> None:
    """Of 40 prompts none is answered differently: up to 8.8 % of all others may be."""
    rows = {name: [measured([1, 0] * 20), measured([0, 1] * 20)] for name in ("a", "b")}
    found = verdict(rows, Ordering(measure="retrieval", better="a", than="b", source="here"))
    assert found.gain.mean == 0 and found.word == "not shown"
    assert found.gain.high == -found.gain.low == pytest.approx(0.0876, abs=1e-4)


def test_a_gain_is_paired_by_prompt() -> None:
    rows = {"a": [measured([1] * 30 + [0] * 10)], "b": [measured([1] * 20 + [0] * 20)]}
    found = verdict(rows, Ordering(measure="retrieval", better="a", than="b", source="here"))
    half = student_quantile(39) * (0.25 * 0.75 * 40 / 39 / 40) ** 0.5
    assert found.word == "shown"
    assert (found.gain.low, found.gain.high) == pytest.approx((0.25 - half, 0.25 + half))
