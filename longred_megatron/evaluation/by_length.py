"""Scores by prompt length: of single tasks, and of groups of tasks, whose mean is one figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.intervals import Interval, combined_interval
from longred_megatron.evaluation.tasks.results import LengthScore, TaskResult


@dataclass(frozen=True)
class ByLength:
    """Scores of a model by length, in order. name: of the task or the group; title, score_meaning: as of `Task`;
    intervals, sets: as of `LengthScore`."""

    name: str
    title: str
    score_meaning: str
    scores: dict[int, float]
    intervals: dict[int, Interval | None]
    sets: dict[int, tuple[float, ...]]

    @property
    def longest(self) -> int:
        return max(self.scores)


def task_by_length(result: TaskResult) -> ByLength:
    """The scores of one task."""
    scores = {score.length: score for score in result.by_length}
    return ByLength(
        result.task,
        result.title,
        result.score_meaning,
        {length: score.accuracy for length, score in scores.items()},
        {length: score.interval for length, score in scores.items()},
        {length: score.sets for length, score in scores.items()},
    )


def scores_by_length(results: Sequence[TaskResult]) -> list[ByLength]:
    """Every task that has no group, and every group: the mean over its tasks, each counting alike, at the lengths that
    all of them have."""
    groups: dict[str, list[TaskResult]] = {}
    for result in results:
        groups.setdefault(result.group or result.task, []).append(result)
    found = []
    for name, members in groups.items():
        if members[0].group:
            shared = set.intersection(*(set(member.lengths) for member in members))
            found += [_group(name, members, sorted(shared))] if shared else []
        else:
            found.append(task_by_length(members[0]))
    return found


def _group(name: str, members: Sequence[TaskResult], lengths: Sequence[int]) -> ByLength:
    scores = {length: [score for each in members if (score := each.at(length))] for length in lengths}
    number = f"{len(members)} task{'s' if len(members) > 1 else ''}"
    return ByLength(
        name,
        f"{name.upper()}, {number}",
        f"mean score of {number}",
        {length: sum(each.accuracy for each in of_tasks) / len(members) for length, of_tasks in scores.items()},
        {length: _interval(of_tasks) for length, of_tasks in scores.items()},
        {
            length: tuple(sum(of_set) / len(members) for of_set in zip(*(each.sets for each in of_tasks), strict=True))
            for length, of_tasks in scores.items()
        },
    )


def _interval(scores: Sequence[LengthScore]) -> Interval | None:
    known = [score.interval for score in scores if score.interval is not None]
    return combined_interval([score.accuracy for score in scores], known) if len(known) == len(scores) else None
