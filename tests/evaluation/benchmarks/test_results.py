import pytest

from longred_megatron.evaluation.benchmarks.results import BenchmarkResult, by_ability


def test_abilities_are_kept_by_paired_differences() -> None:
    def result(name: str, ability: str, scores: list[float]) -> BenchmarkResult:
        mean = sum(scores) / len(scores)
        return BenchmarkResult(name, ability, name, "acc,none", None, len(scores), mean, tuple(scores))

    before = [result("a", "reading", [1.0] * 40 + [0.0] * 60), result("b", "reading", [1.0] * 100)]
    after = [result("a", "reading", [1.0] * 20 + [0.0] * 80), result("b", "reading", [1.0] * 100)]
    [kept] = by_ability(after, before)
    assert kept.score == pytest.approx(0.6) and kept.kept == pytest.approx(0.6 / 0.7)
    assert kept.kept_interval is not None and 0.75 < kept.kept_interval.low < 0.857 < kept.kept_interval.high < 0.95
    [same] = by_ability(before, before)
    assert same.kept == 1.0
    [nothing] = by_ability([result("a", "code", [0.0])], [result("a", "code", [0.0])])
    assert nothing.kept is None and nothing.kept_interval is None
