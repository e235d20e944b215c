"""The results of an evaluation: typed, as JSON, and as one printed table."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longred_megatron.errors import UserError
from longred_megatron.evaluation.benchmarks.results import AbilityResult, BenchmarkResult, benchmark_table
from longred_megatron.evaluation.by_length import ByLength, scores_by_length, task_by_length
from longred_megatron.evaluation.effective_length import EffectiveLength, effective_length_table
from longred_megatron.evaluation.intervals import CONFIDENCE
from longred_megatron.evaluation.perplexity import LossByPosition, perplexity
from longred_megatron.evaluation.similarity import LayerSimilarity
from longred_megatron.evaluation.table import Cell, Column, Table, aligned, between, number, percent, percent_change
from longred_megatron.evaluation.tasks.results import LengthScore, TaskResult
from longred_megatron.files import try_output
from longred_megatron.page import RESULTS

KIND = "longred_megatron.evaluation"


@dataclass(frozen=True)
class ModelReport:
    """All measurements of one model. similarity is None for the reference, and where it cannot be computed
    (`notes` says why); abilities: what is kept of them, empty for the reference; run, step: of the checkpoint that it
    is, None for a Hugging Face folder."""

    name: str
    path: str
    family: str
    run: str | None
    step: int | None
    is_reference: bool
    max_position_embeddings: int
    rope: dict[str, Any] | None
    num_parameters: int
    short: LossByPosition
    long: LossByPosition
    retrieval: tuple[TaskResult, ...]
    effective_lengths: tuple[EffectiveLength, ...]
    benchmarks: tuple[BenchmarkResult, ...]
    abilities: tuple[AbilityResult, ...]
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

    @property
    def shown(self) -> list[ModelReport]:
        """The models that have lines of their own in the figures: of a run the last checkpoint."""
        last = {model.run: model for model in self.models if model.run is not None}
        return [model for model in self.models if model.run is None or last[model.run] is model]

    def to_json(self) -> str:
        """Every number, with `kind` to know the file by. A number that is not finite becomes null."""
        plain = dataclasses.asdict(self)
        for model in plain["models"]:
            model["retrieval"] = [{**result.pop("facts"), **result} for result in model["retrieval"]]
        return json.dumps(_finite({"kind": KIND, **plain}), indent=1, allow_nan=False) + "\n"


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


def tables(report: Report) -> list[Table]:
    """The tables below the summary: those that there is something for."""
    names = [model.name for model in report.models]
    found = [_task_table(report)] if any(result.group for result in report.reference.retrieval) else []
    found.append(effective_length_table(names, [model.effective_lengths for model in report.models]))
    if report.reference.benchmarks:
        results = [model.benchmarks for model in report.models]
        found.append(benchmark_table(names, results, [model.abilities for model in report.models]))
    return found


def _task_table(report: Report) -> Table:
    """The tasks of groups: one a row at its longest prompts, one column a model."""
    tasks = [result for result in report.reference.retrieval if result.group]
    columns = [Column("task", "", tuple(Cell(f"{result.task} @{result.longest.length:,}") for result in tasks))]
    for model in report.models:
        scores = {result.task: result.longest for result in model.retrieval}
        columns.append(Column(model.name, "", tuple(_score_cell(scores[result.task]) for result in tasks)))
    return Table("Tasks at their longest length", "Mean score, and its 95 % interval over prompts.", tuple(columns))


def _at_longest(model: ModelReport, name: str) -> Cell:
    """The score of a task or group at the longest prompts of the model."""
    for each in model.by_length:
        if each.name == name:
            return Cell(percent(each.scores[each.longest]), between(each.intervals[each.longest], percent))
    return Cell("-")


def _perplexity_cell(losses: LossByPosition) -> Cell:
    return Cell(number(losses.perplexity), between(losses.perplexity_interval, number))


def _change_cell(losses: LossByPosition, reference: ModelReport) -> Cell:
    change = percent_change(losses.perplexity, reference.short.perplexity)
    interval = losses.against_reference.interval if losses.against_reference else None
    return Cell(change, between(interval, lambda loss: percent_change(perplexity(loss), 1.0)))


def _score_cell(score: LengthScore) -> Cell:
    return Cell(percent(score.accuracy), between(score.interval, percent))


def format_table(report: Report) -> str:
    """The summary as aligned plain text, 95 % intervals in brackets, and the notes below it."""
    lines = aligned([Column("model", "", tuple(Cell(model.name) for model in report.models)), *summary(report)])
    for table in tables(report):
        lines += ["", f"{table.title}:", *aligned(table.columns)]
    lines.append("")
    legend = f"in brackets: {CONFIDENCE:.0%} intervals, over documents and over prompts"
    return "\n".join([*lines, legend, *(f"note: {note}" for note in all_notes(report))])


def all_notes(report: Report) -> list[str]:
    """The notes of the run, those that hold for every model, then those of single models under their names."""
    common = [note for note in report.reference.notes if all(note in model.notes for model in report.models)]
    own = [f"{model.name}: {note}" for model in report.models for note in model.notes if note not in common]
    return [*report.notes, *common, *own]


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
