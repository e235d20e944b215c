"""The scores of one model on one task, by length and, where the task has it, by depth."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from tqdm import tqdm

from longred_megatron.evaluation.intervals import Interval, difference_interval, score_interval
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
class LengthScore:
    """All prompts of one length.

    accuracy: mean score; sets: of each prompt set. difference: accuracy less the reference's, over the same
    prompts; None for the reference, and where the tokenizer is not the reference's.
    """

    length: int
    num_samples: int
    accuracy: float
    interval: Interval | None
    sets: tuple[float, ...]
    difference: float | None
    difference_interval: Interval | None


@dataclass(frozen=True)
class TaskResult:
    """All scores of one task. lengths: in order; depths: in order, empty where the task has none. facts: what of the
    task's options decided its prompts. group: see `Task`."""

    task: str
    group: str | None
    title: str
    score_meaning: str
    facts: dict[str, int | str]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[Cell, ...]
    by_length: tuple[LengthScore, ...]

    def at(self, length: int) -> LengthScore | None:
        """The score at one length, None where the task was not asked there."""
        return next((score for score in self.by_length if score.length == length), None)

    def accuracy_at(self, length: int) -> float:
        """The mean score at one of `lengths`."""
        return next(score.accuracy for score in self.by_length if score.length == length)

    @property
    def longest(self) -> LengthScore:
        """The score at the longest length."""
        return self.by_length[-1]


def measure_task(
    model: CausalModel,
    task: Task,
    prompts: Sequence[Prompt],
    tokens_per_batch: int,
    seed: int = 0,
    reference: TaskResult | None = None,
) -> TaskResult:
    """Scores every prompt, batched by length, as many as fit in `tokens_per_batch` (at least one). reference: what the
    reference made of the same prompts. seed: of the intervals."""
    scores: dict[tuple[int, float | None], dict[tuple[int, int], float]] = defaultdict(dict)
    with tqdm(
        total=len(prompts), desc=f"{model.name}: {task.name}", unit="prompt", disable=None, leave=False
    ) as progress:
        for batch in _batches(task, prompts, tokens_per_batch):
            for prompt, score in zip(batch, task.scores(model, batch), strict=True):
                scores[prompt.length, prompt.depth][prompt.prompt_set, prompt.sample] = score
            progress.update(len(batch))
    found = [_cell(length, depth, of_cell) for (length, depth), of_cell in scores.items()]
    cells = sorted(found, key=lambda cell: (cell.length, cell.depth or 0.0))
    lengths = tuple(sorted({cell.length for cell in cells}))
    return TaskResult(
        task=task.name,
        group=task.group,
        title=task.title,
        score_meaning=task.score_meaning,
        facts=task.facts(),
        lengths=lengths,
        depths=tuple(sorted({cell.depth for cell in cells if cell.depth is not None})),
        cells=tuple(cells),
        by_length=tuple(_length_score(length, cells, seed, reference) for length in lengths),
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


def _length_score(length: int, cells: Sequence[Cell], seed: int, reference: TaskResult | None) -> LengthScore:
    of_length = [cell for cell in cells if cell.length == length]
    scores = _scores_of(of_length)
    accuracy = sum(scores) / len(scores)
    difference, interval = None, None
    if reference is not None:
        theirs = _scores_of([cell for cell in reference.cells if cell.length == length])
        difference = accuracy - sum(theirs) / len(theirs)
        interval = difference_interval(scores, theirs, seed)
    sets = tuple(sum(of_set) / len(of_set) for of_set in zip(*(cell.sets for cell in of_length), strict=True))
    return LengthScore(length, len(scores), accuracy, score_interval(scores, seed), sets, difference, interval)


def _scores_of(cells: Sequence[Cell]) -> list[float]:
    return [score for cell in cells for score in cell.scores]
