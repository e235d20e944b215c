"""How long a context a model really uses, by two published rules.

RULER (arXiv 2404.06654): the longest length with a mean score of at least 85.6 %, what Llama-2-7B reaches at 4,096
tokens over RULER's 13 tasks. NoLiMa (arXiv 2502.05167): the longest length that keeps 0.85 of the model's own base
score; its base score is the best of its three shortest lengths, taken for each question, here for the mean score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.by_length import ByLength
from longred_megatron.evaluation.table import Cell, Column, Table, percent

RULER_THRESHOLD = 0.856
KEPT_SHARE = 0.85
NUM_BASE_LENGTHS = 3


@dataclass(frozen=True)
class EffectiveLength:
    """Of one task or group, in tokens; None: no length that was measured.

    threshold: the score that was asked for; length: the longest with at least that mean score; sure_length: the longest
    whose 95 % interval lies at it or above; measured: the longest measured.
    """

    name: str
    rule: str
    threshold: float
    length: int | None
    sure_length: int | None
    measured: int


def effective_lengths(by_length: Sequence[ByLength]) -> tuple[EffectiveLength, ...]:
    """By both rules, for every task or group. The base score is taken as exact."""
    found = []
    for scores in by_length:
        base = max(scores.scores[length] for length in sorted(scores.scores)[:NUM_BASE_LENGTHS])
        rules = {f"at least {100 * RULER_THRESHOLD:.1f} %": RULER_THRESHOLD, f"{KEPT_SHARE} of base": KEPT_SHARE * base}
        found += [_effective_length(scores, rule, threshold) for rule, threshold in rules.items()]
    return tuple(found)


def _effective_length(scores: ByLength, rule: str, threshold: float) -> EffectiveLength:
    """Of a model that never answers no length is kept, although 0 is all of 0."""
    passed = [length for length, score in scores.scores.items() if score >= threshold > 0]
    sure = [length for length in passed if (found := scores.intervals[length]) and found.low >= threshold]
    return EffectiveLength(
        scores.name, rule, threshold, max(passed, default=None), max(sure, default=None), scores.longest
    )


def effective_length_table(names: Sequence[str], of_models: Sequence[Sequence[EffectiveLength]]) -> Table:
    """names: of the models; of_models: their lengths, for the same tasks in the same order as the first's."""
    rows = [(each.name, each.rule) for each in of_models[0]]
    columns = [Column("tokens", "", tuple(Cell(f"{name}, {rule}") for name, rule in rows))]
    for name, lengths in zip(names, of_models, strict=True):
        held = {(each.name, each.rule): each for each in lengths}
        columns.append(Column(name, "", tuple(_cell(held[row]) if row in held else Cell("-") for row in rows)))
    return Table(
        "Effective length",
        "The longest prompts with a mean score of at least 85.6 % (RULER's rule, made for the mean of its 13 tasks), "
        "and of at least 0.85 of the model's best score on the three shortest lengths (NoLiMa's rule); below each, the "
        "longest for which the 95 % interval says so too. Promise no more than the lower one.",
        tuple(columns),
    )


def _cell(found: EffectiveLength) -> Cell:
    if found.length is None:
        return Cell("none", f"asked {percent(found.threshold)}" if found.threshold else "")
    more = "≥ " if found.length == found.measured else ""
    return Cell(f"{more}{found.length:,}", f"sure: {found.sure_length:,}" if found.sure_length else "sure: none")
