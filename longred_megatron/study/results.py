"""The figures of a study: its table, and each claim held against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from longred_megatron.evaluation.intervals import share_interval
from longred_megatron.study.estimates import Estimate, differences, estimate
from longred_megatron.study.measure import Measured
from longred_megatron.study.settings import Ordering

ORIGINAL = "original"
LESS_IS_BETTER = ("short", "long")
Rows = Mapping[str, Sequence[Measured]]
"""Row of the table -> its models, one for each seed."""


@dataclass(frozen=True)
class Verdict:
    """gain: of the better over the other, in the direction of "better": nats a token, or a share of prompts."""

    ordering: Ordering
    gain: Estimate

    @property
    def word(self) -> str:
        """shown: the whole interval is above 0; opposite: below; not shown: 0 lies in it."""
        return "shown" if self.gain.low > 0 else "opposite" if self.gain.high < 0 else "not shown"


def verdict(rows: Rows, ordering: Ordering) -> Verdict:
    """A claim against the figures, paired by seed and text or prompt.

    Where two models answer all prompts alike, Wilson's interval says how many others they may answer differently.
    """
    better, than = ([each.units(ordering.measure) for each in rows[name]] for name in (ordering.better, ordering.than))
    sign = -1.0 if ordering.measure in LESS_IS_BETTER else 1.0
    found = sign * differences(better, than)
    gain = estimate(found)
    if gain.low == gain.high and ordering.measure not in LESS_IS_BETTER:
        most = share_interval(0.0, found.shape[1]).high
        gain = Estimate(gain.mean, max(-1.0, gain.mean - most), min(1.0, gain.mean + most))
    return Verdict(ordering, gain)


def changes(rows: Rows, row: str) -> dict[str, Estimate]:
    """Of one row, by measure: change of the two losses against the original's, and the share of prompts answered."""
    found = {}
    for measure in LESS_IS_BETTER:
        ours, theirs = ([each.units(measure) for each in rows[name]] for name in (row, ORIGINAL))
        found[measure] = estimate(differences(ours, theirs))
    for length in sorted(rows[row][0].prompts):
        found[f"@{length}"] = _share([each.prompts[length] for each in rows[row]])
    return found


def _share(scores: Sequence[Sequence[float]]) -> Estimate:
    """Of prompts answered, scores[seeds, prompts]; where nothing varies, as for none answered, Wilson's interval."""
    share = estimate(np.asarray(scores))
    if share.low == share.high:
        ends = share_interval(share.mean, len(scores[0]))
        return Estimate(share.mean, ends.low, ends.high)
    return Estimate(share.mean, max(0.0, share.low), min(1.0, share.high))


def table(rows: Rows) -> list[list[str]]:
    """A line for each row: means, and intervals in brackets."""
    lengths = sorted(rows[ORIGINAL][0].prompts)
    titles = ["model", "seeds", "short loss", "change", "long loss", "change", *(f"answered @{n:,}" for n in lengths)]
    lines = [[*titles, "similarity"]]
    for row, models in rows.items():
        found = changes(rows, row)
        cells = [row, str(len(models))]
        for measure in LESS_IS_BETTER:
            loss = mean(value for each in models for value in each.units(measure))
            cells += [f"{loss:.3f}", "" if row == ORIGINAL else interval(found[measure], "{:+.3f}")]
        cells += [interval(found[f"@{length}"], "{:.0%}") for length in lengths]
        similarities = [each.similarity for each in models if each.similarity is not None]
        lines.append([*cells, f"{mean(similarities):.4f}" if similarities else ""])
    return lines


def verdict_table(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line for each claim."""
    lines = [["claim", "measure", "gain", "here", "source"]]
    for each in verdicts:
        unit = "{:+.3f}" if each.ordering.measure in LESS_IS_BETTER else "{:+.0%}"
        claim = f"{each.ordering.better} better than {each.ordering.than}"
        lines.append([claim, each.ordering.measure, interval(each.gain, unit), each.word, each.ordering.source])
    return lines


def interval(value: Estimate, form: str) -> str:
    """mean (low to high)."""
    low, high = (form.format(end) for end in (value.low, value.high))
    return form.format(value.mean) + (f" ({low} to {high})" if low != high else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "| --- " * len(lines[0]) + "|", *rest]) + "\n"
