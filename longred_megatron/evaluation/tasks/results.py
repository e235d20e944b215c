"""The scores of one model on one task, by length and, where the task has it, by depth."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from tqdm import tqdm

from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.tasks.base import Prompt, Task


@dataclass(frozen=True)
class Cell:
    """All prompts of one length and depth (None: the task has none).

    accuracy: mean of `scores`; sets: mean of each prompt set; scores: of the num_samples prompts, set by set and in a
    set sample by sample, so that they can be compared with another model's one by one.
    """

    length: int
    depth: float | None
    num_samples: int
    accuracy: float
    sets: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TaskResult:
    """All cells of one task. lengths: in order; depths: in order, empty where the task has none. facts: what of the
    task's options decided its prompts. group: see `Task`."""

    task: str
    group: str | None
    title: str
    score_meaning: str
    facts: dict[str, int | str]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[Cell, ...]

    def accuracy_at(self, length: int) -> float:
        """Mean score over all prompts of one length."""
        cells = [cell.accuracy for cell in self.cells if cell.length == length]
        return sum(cells) / len(cells)


def measure_task(model: CausalModel, task: Task, prompts: Sequence[Prompt], tokens_per_batch: int) -> TaskResult:
    """Scores every prompt, batched by length, as many as fit in `tokens_per_batch` (at least one)."""
    scores: dict[tuple[int, float | None], dict[tuple[int, int], float]] = defaultdict(dict)
    with tqdm(
        total=len(prompts), desc=f"{model.name}: {task.name}", unit="prompt", disable=None, leave=False
    ) as progress:
        for batch in _batches(task, prompts, tokens_per_batch):
            for prompt, score in zip(batch, task.scores(model, batch), strict=True):
                scores[prompt.length, prompt.depth][prompt.prompt_set, prompt.sample] = score
            progress.update(len(batch))
    cells = tuple(_cell(length, depth, of_cell) for (length, depth), of_cell in scores.items())
    return TaskResult(
        task=task.name,
        group=task.group,
        title=task.title,
        score_meaning=task.score_meaning,
        facts=task.facts(),
        lengths=tuple(sorted({cell.length for cell in cells})),
        depths=tuple(sorted({cell.depth for cell in cells if cell.depth is not None})),
        cells=tuple(sorted(cells, key=lambda cell: (cell.length, cell.depth or 0.0))),
    )


def _batches(task: Task, prompts: Sequence[Prompt], tokens_per_batch: int) -> Iterator[list[Prompt]]:
    """Prompts with equally many tokens, so that nothing has to be padded."""
    for num_tokens, group in groupby(sorted(prompts, key=task.num_row_tokens), key=task.num_row_tokens):
        equal = list(group)
        size = max(1, tokens_per_batch // num_tokens)
        for start in range(0, len(equal), size):
            yield equal[start : start + size]


def _cell(length: int, depth: float | None, scores: dict[tuple[int, int], float]) -> Cell:
    """scores: by set and sample."""
    by_set: dict[int, list[float]] = defaultdict(list)
    for (prompt_set, _), score in sorted(scores.items()):
        by_set[prompt_set].append(score)
    flat = tuple(score for of_set in by_set.values() for score in of_set)
    sets = tuple(sum(of_set) / len(of_set) for of_set in by_set.values())
    return Cell(length, depth, len(flat), sum(flat) / len(flat), sets, flat)
