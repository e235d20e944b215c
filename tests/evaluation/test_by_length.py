import pytest

from longred_megatron.evaluation.by_length import scores_by_length
from longred_megatron.evaluation.intervals import Interval, combined_interval
from longred_megatron.evaluation.tasks.results import LengthScore, TaskResult


def result_of(task: str, group: str | None, scores: dict[int, float]) -> TaskResult:
    by_length = tuple(
        LengthScore(length, 2, score, Interval(score - 0.1, score + 0.2), (score - 0.1, score + 0.1), None, None)
        for length, score in scores.items()
    )
    return TaskResult(task, group, task.title(), "share", {}, tuple(scores), (), (), by_length)


def test_a_group_is_the_mean_of_its_tasks_where_all_have_room() -> None:
    results = [
        result_of("key", None, {256: 1.0}),
        result_of("one", "many", {256: 0.2, 512: 0.4, 1024: 0.6}),
        result_of("two", "many", {512: 0.8, 1024: 0.0}),
    ]
    key, many = scores_by_length(results)
    assert (key.name, key.title, key.scores, key.longest) == ("key", "Key", {256: 1.0}, 256)
    assert (many.name, many.title, many.longest) == ("many", "MANY, 2 tasks", 1024)
    assert many.scores == {512: pytest.approx(0.6), 1024: pytest.approx(0.3)}
    assert many.sets[512] == pytest.approx((0.5, 0.7))
    both = [result.at(512) for result in results[1:]]
    assert many.intervals[512] == combined_interval([0.4, 0.8], [each.interval for each in both if each])


def test_a_group_without_a_shared_length_has_no_mean() -> None:
    results = [result_of("one", "many", {256: 0.2}), result_of("two", "many", {512: 0.8})]
    assert scores_by_length(results) == []
