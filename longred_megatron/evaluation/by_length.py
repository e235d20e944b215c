"""Scores by prompt length: of single tasks, and of groups of tasks, whose mean is one figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.tasks.results import TaskResult


@dataclass(frozen=True)
class ByLength:
    """Scores of a model by length, in order. name: of the task or the group; title, score_meaning: as of `Task`."""

    name: str
    title: str
    score_meaning: str
    scores: dict[int, float]

    @property
    def longest(self) -> int:
        return max(self.scores)


def scores_by_length(results: Sequence[TaskResult]) -> list[ByLength]:
    """Every task that has no group, and every group: the mean over its tasks, each counting alike, at the lengths that
    all of them have."""
    groups: dict[str, list[TaskResult]] = {}
    for result in results:
        groups.setdefault(result.group or result.task, []).append(result)
    found = []
    for name, members in groups.items():
        shared = set.intersection(*(set(member.lengths) for member in members))
        means = {length: sum(each.accuracy_at(length) for each in members) / len(members) for length in sorted(shared)}
        if means and members[0].group:
            number = f"{len(members)} task{'s' if len(members) > 1 else ''}"
            found.append(ByLength(name, f"{name.upper()}, {number}", f"mean score of {number}", means))
        elif means:
            found.append(ByLength(name, members[0].title, members[0].score_meaning, means))
    return found
