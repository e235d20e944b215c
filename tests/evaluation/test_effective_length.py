import pytest

from longred_megatron.evaluation.by_length import ByLength
from longred_megatron.evaluation.effective_length import EffectiveLength, effective_length_table, effective_lengths
from longred_megatron.evaluation.intervals import Interval

# NoLiMa's table: base score, scores from 1K to 32K, and the effective length printed beside them.
NOLIMA = [
    (99.3, (98.1, 98.0, 95.7, 89.2, 81.6, 69.7), 8192),
    (97.3, (94.2, 87.4, 81.5, 72.1, 59.5, 42.7), 2048),
    (87.6, (85.4, 84.0, 77.6, 61.7, 45.7, 29.8), 4096),
    (76.7, (65.7, 54.4, 44.1, 31.9, 22.6, 14.2), 1024),
]


def scores_of(scores: dict[int, float], half: float = 0.05) -> ByLength:
    intervals = {length: Interval(score - half, score + half) for length, score in scores.items()}
    return ByLength("ruler", "RULER", "mean", scores, intervals, {})


@pytest.mark.parametrize(("base", "scores", "length"), NOLIMA)
def test_lengths_printed_by_nolima(base: float, scores: tuple[float, ...], length: int) -> None:
    by_length = {250: base / 100, 500: 0.0, 900: 0.0} | {
        1024 * 2**place: score / 100 for place, score in enumerate(scores)
    }
    _, kept = effective_lengths([scores_of(by_length)])
    assert (kept.length, kept.threshold) == (length, pytest.approx(0.85 * base / 100))


def test_both_rules_and_what_is_sure() -> None:
    fixed, kept = effective_lengths([scores_of({512: 0.95, 1024: 0.99, 2048: 0.91, 4096: 0.86, 8192: 0.845})])
    assert fixed == EffectiveLength("ruler", "at least 85.6 %", 0.856, 4096, 2048, 8192)
    assert kept == EffectiveLength("ruler", "0.85 of base", pytest.approx(0.8415), 8192, 2048, 8192)


def test_a_model_that_never_answers_has_none() -> None:
    assert [each.length for each in effective_lengths([scores_of({512: 0.0, 1024: 0.0})])] == [None, None]


def test_a_base_of_nothing_asks_for_nothing() -> None:
    nothing = effective_lengths([scores_of({512: 0.0, 1024: 0.0})])
    _, cells = (column.cells for column in effective_length_table(["bad"], [nothing]).columns)
    assert [(cell.value, cell.interval) for cell in cells] == [("none", "asked 86 %"), ("none", "")]


def test_the_table() -> None:
    good, bad = (effective_lengths([scores_of(scores)]) for scores in ({512: 0.99, 1024: 0.95}, {512: 0.5, 1024: 0.2}))
    table = effective_length_table(["good", "bad"], [good, bad])
    names, ours, theirs = ([f"{c.value} ({c.interval})" for c in column.cells] for column in table.columns)
    assert names == ["ruler, at least 85.6 % ()", "ruler, 0.85 of base ()"]
    assert ours == ["≥ 1,024 (sure: 1,024)", "≥ 1,024 (sure: 1,024)"]
    assert theirs == ["none (asked 86 %)", "512 (sure: 512)"]
