import pytest

from longred_megatron.evaluation.by_length import scores_by_length
from longred_megatron.evaluation.tasks.results import Cell, TaskResult


def result_of(task: str, group: str | None, scores: dict[int, float]) -> TaskResult:
    cells = tuple(Cell(length, None, 1, score, (score,), (score,)) for length, score in scores.items())
    return TaskResult(task, group, task.title(), "share", {}, tuple(scores), (), cells)


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


def test_a_group_without_a_shared_length_has_no_mean() -> None:
    results = [result_of("one", "many", {256: 0.2}), result_of("two", "many", {512: 0.8})]
    assert scores_by_length(results) == []
