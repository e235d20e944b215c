"""Scores on benchmarks, what of each ability a model keeps, and the table of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.intervals import Interval, combined_interval, difference_interval, score_interval
from longred_megatron.evaluation.table import Cell, Column, Table, between, percent


@dataclass(frozen=True)
class BenchmarkResult:
    """score: the mean over num_questions, 0 to 1; scores: of each question, in the data set's order; empty where the
    metric is no mean over questions. metric, num_examples: see `Benchmark`."""

    benchmark: str
    ability: str
    task: str
    metric: str
    num_examples: int | None
    num_questions: int
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class AbilityResult:
    """score: the mean over the ability's benchmarks, each counting alike; kept: score / the reference's score; None
    where that is 0. kept_interval: from the paired differences of the questions' scores, the reference's score taken
    as exact; None where a benchmark has no scores of single questions."""

    ability: str
    score: float
    kept: float | None
    kept_interval: Interval | None


def by_ability(results: Sequence[BenchmarkResult], reference: Sequence[BenchmarkResult]) -> tuple[AbilityResult, ...]:
    """The abilities in the order of their benchmarks. `reference` has the same benchmarks."""
    found = []
    for ability in dict.fromkeys(result.ability for result in results):
        pairs = [pair for pair in zip(results, reference, strict=True) if pair[0].ability == ability]
        score = sum(ours.score for ours, _ in pairs) / len(pairs)
        before = sum(theirs.score for _, theirs in pairs) / len(pairs)
        differences = [each for ours, theirs in pairs if (each := _difference(ours, theirs))]
        interval = None
        if before and len(differences) == len(pairs):
            both = combined_interval([ours.score - theirs.score for ours, theirs in pairs], differences)
            interval = Interval(1 + both.low / before, 1 + both.high / before)
        found.append(AbilityResult(ability, score, score / before if before else None, interval))
    return tuple(found)


def _difference(ours: BenchmarkResult, theirs: BenchmarkResult) -> Interval | None:
    return difference_interval(ours.scores, theirs.scores) if ours.scores and theirs.scores else None


def benchmark_table(
    names: Sequence[str], results: Sequence[Sequence[BenchmarkResult]], kept: Sequence[Sequence[AbilityResult]]
) -> Table:
    """names: of the models; results: of each; kept: of each, empty for the reference."""
    abilities = next((each for each in kept if each), ())
    rows = [f"{each.benchmark} ({each.num_questions:,} questions)" for each in results[0]]
    rows += [f"{each.ability}, kept" for each in abilities]
    columns = [Column("benchmark", "", tuple(Cell(row) for row in rows))]
    for name, of_model, of_abilities in zip(names, results, kept, strict=True):
        cells = [_score_cell(each) for each in of_model]
        cells += [_kept_cell(each) for each in of_abilities] or [Cell("reference")] * len(abilities)
        columns.append(Column(name, "", tuple(cells)))
    return Table(
        "Published benchmarks on short texts",
        "Scores by lm-evaluation-harness, with 95 % intervals over questions, and the share of the reference's score "
        "that is kept of each ability, with the interval of the differences on each question. Below 100 % for certain: "
        "give short texts more of the training, or more weight.",
        tuple(columns),
    )


def _score_cell(result: BenchmarkResult) -> Cell:
    return Cell(percent(result.score), between(score_interval(result.scores) if result.scores else None, percent))


def _kept_cell(result: AbilityResult) -> Cell:
    return Cell("-" if result.kept is None else percent(result.kept), between(result.kept_interval, percent))
