"""The results of an evaluation: typed, as JSON, and as one printed table."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longred_megatron.errors import UserError
from longred_megatron.evaluation.by_length import ByLength, scores_by_length, task_by_length
from longred_megatron.evaluation.intervals import CONFIDENCE, Interval
from longred_megatron.evaluation.perplexity import LossByPosition, perplexity
from longred_megatron.evaluation.similarity import LayerSimilarity
from longred_megatron.evaluation.tasks.results import LengthScore, TaskResult
from longred_megatron.files import try_output

KIND = "longred_megatron.evaluation"
RESULTS, PAGE = "results.json", "report.html"


@dataclass(frozen=True)
class ModelReport:
    """All measurements of one model. similarity is None for the reference, and where it cannot be computed
    (`notes` says why)."""

    name: str
    path: str
    family: str
    is_reference: bool
    max_position_embeddings: int
    rope: dict[str, Any] | None
    num_parameters: int
    short: LossByPosition
    long: LossByPosition
    retrieval: tuple[TaskResult, ...]
    similarity: LayerSimilarity | None
    notes: tuple[str, ...]

    @property
    def by_length(self) -> list[ByLength]:
        """The scores of every task, or of its group, by length."""
        return scores_by_length(self.retrieval)

    @property
    def panels(self) -> list[ByLength]:
        """The same, and then the tasks of groups one by one."""
        return [*self.by_length, *(task_by_length(result) for result in self.retrieval if result.group)]


@dataclass(frozen=True)
class Report:
    """models: in the order given, the reference among them. settings: everything that decides the numbers.
    Windows are in tokens."""

    models: tuple[ModelReport, ...]
    original_window: int
    extended_window: int
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    command: str | None
    seconds: float

    @property
    def reference(self) -> ModelReport:
        return next(model for model in self.models if model.is_reference)

    def to_json(self) -> str:
        """Every number, with `kind` to know the file by. A number that is not finite becomes null."""
        plain = dataclasses.asdict(self)
        for model in plain["models"]:
            model["retrieval"] = [{**result.pop("facts"), **result} for result in model["retrieval"]]
        return json.dumps(_finite({"kind": KIND, **plain}), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Cell:
    """A figure of the table, ready to print, and its interval or nothing."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a table. explanation: one sentence for the page."""

    title: str
    explanation: str
    cells: tuple[Cell, ...]


def summary(report: Report) -> list[Column]:
    """The columns of the summary table, one cell a model."""
    original, extended = report.original_window, report.extended_window
    return [
        Column(
            "window",
            "Context window the model's config states, in tokens.",
            _each(report, lambda m: Cell(f"{m.max_position_embeddings:,}")),
        ),
        Column(
            f"short ppl @{original:,}",
            f"Perplexity on short texts at the original window of {original:,} tokens; lower is better.",
            _each(report, lambda m: _perplexity_cell(m.short)),
        ),
        Column(
            "change",
            "Change of the short-text perplexity against the reference; near zero: short texts are kept. Its interval "
            "is over the differences on each document.",
            _each(report, lambda m: Cell("reference") if m.is_reference else _change_cell(m.short, report.reference)),
        ),
        Column(
            f"long ppl @{extended:,}",
            f"Perplexity on long texts at the extended window of {extended:,} tokens; lower is better.",
            _each(report, lambda m: _perplexity_cell(m.long)),
        ),
        *task_columns(report),
        Column(
            "similarity",
            "Mean cosine similarity of hidden states to the reference's on short texts; 1: unchanged.",
            _each(report, lambda m: Cell("-" if m.similarity is None else f"{m.similarity.mean:.3f}")),
        ),
    ]


def task_columns(report: Report) -> list[Column]:
    """Each task, or group of tasks, at the longest prompts."""
    return [
        Column(
            f"{scores.name} @{scores.longest:,}",
            f"{scores.title}: {scores.score_meaning}, over all prompts of {scores.longest:,} tokens; higher is better.",
            tuple(_at_longest(model, scores.name) for model in report.models),
        )
        for scores in report.reference.by_length
    ]


def task_table(report: Report) -> list[Column]:
    """Where tasks have a group: one a row at its longest prompts, one column a model. Else nothing."""
    tasks = [result for result in report.reference.retrieval if result.group]
    if not tasks:
        return []
    names = tuple(Cell(f"{result.task} @{result.longest.length:,}") for result in tasks)
    columns = [Column("task", "", names)]
    for model in report.models:
        scores = {result.task: result.longest for result in model.retrieval}
        columns.append(Column(model.name, "", tuple(_score_cell(scores[result.task]) for result in tasks)))
    return columns


def _at_longest(model: ModelReport, name: str) -> Cell:
    """The score of a task or group at the longest prompts of the model."""
    for each in model.by_length:
        if each.name == name:
            return Cell(percent(each.scores[each.longest]), _between(each.intervals[each.longest], percent))
    return Cell("-")


def _perplexity_cell(losses: LossByPosition) -> Cell:
    return Cell(number(losses.perplexity), _between(losses.perplexity_interval, number))


def _change_cell(losses: LossByPosition, reference: ModelReport) -> Cell:
    change = percent_change(losses.perplexity, reference.short.perplexity)
    interval = losses.against_reference.interval if losses.against_reference else None
    return Cell(change, _between(interval, lambda loss: percent_change(perplexity(loss), 1.0)))


def _score_cell(score: LengthScore) -> Cell:
    return Cell(percent(score.accuracy), _between(score.interval, percent))


def _between(interval: Interval | None, shown: Callable[[float], str]) -> str:
    """Both ends; units that both carry are said once."""
    if interval is None:
        return ""
    low, high = shown(interval.low), shown(interval.high)
    return f"{low.removesuffix(' %')} to {high}" if high.endswith(" %") else f"{low} to {high}"


def format_table(report: Report) -> str:
    """The summary as aligned plain text, 95 % intervals in brackets, and the notes below it."""
    lines = _aligned([Column("model", "", tuple(Cell(model.name) for model in report.models)), *summary(report)])
    if many := task_table(report):
        lines += ["", *_aligned(many)]
    legend = f"in brackets: {CONFIDENCE:.0%} intervals, over documents and over prompts"
    return "\n".join([*lines, legend, *(f"note: {note}" for note in all_notes(report))])


def _aligned(columns: list[Column]) -> list[str]:
    texts = [
        [column.title, *(f"{c.value} ({c.interval})" if c.interval else c.value for c in column.cells)]
        for column in columns
    ]
    widths = [max(map(len, column)) for column in texts]
    lines = []
    for row in zip(*texts, strict=True):
        first, *others = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def all_notes(report: Report) -> list[str]:
    """The notes of the run, those that hold for every model, then those of single models under their names."""
    common = [note for note in report.reference.notes if all(note in model.notes for model in report.models)]
    own = [f"{model.name}: {note}" for model in report.models for note in model.notes if note not in common]
    return [*report.notes, *common, *own]


def number(value: float) -> str:
    """A perplexity: two digits after the point below 1,000, none from there to a million, powers of ten
    above."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share of 1 in whole percent."""
    return f"{100 * share:.0f} %"


def percent_change(value: float, reference: float) -> str:
    """How much `value` lies above `reference`, in percent; from a hundredfold on, and if not finite, their ratio."""
    change = 100 * (value / reference - 1)
    return f"{change:+.1f} %" if math.isfinite(change) and change < 1e4 else f"x {number(value / reference)}"


def _each(report: Report, cell: Callable[[ModelReport], Cell]) -> tuple[Cell, ...]:
    return tuple(cell(model) for model in report.models)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_output(output: Path, kind: str = KIND) -> None:
    """Raises `UserError` unless `output` can take a report without losing anything: new, empty, or the place
    of an earlier report."""
    try_output(output / RESULTS, "--output")
    if not output.exists() or not any(output.iterdir()):
        return
    results = output / RESULTS
    try:
        held = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    except (ValueError, RecursionError, OSError):
        held = None
    if not (isinstance(held, dict) and held.get("kind") == kind):
        raise UserError(f"--output {output}: is not empty and holds no earlier report; give a new folder")
