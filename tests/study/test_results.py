"""The table of a study: what stands in its cells."""

import pytest

from longred_megatron.evaluation.intervals import share_interval
from longred_megatron.study.measure import Measured
from longred_megatron.study.results import ORIGINAL, changes, table


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
