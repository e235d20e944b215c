"""What a study leaves in its folder: the page, the table as Markdown, and every figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longred_megatron.analysis.page import Study
from longred_megatron.files import write_text
from longred_megatron.page import INK, MODEL_COLOURS, STYLE, Plot, svg_of
from longred_megatron.study.estimates import Estimate
from longred_megatron.study.results import Rows, Verdict, changes, markdown, table, verdict_table
from longred_megatron.study.settings import StudyFile

KIND = "longred_megatron.study"
TABLE = "table.md"
CAPTION = (
    "Dots are means over seeds, lines 95 % intervals for other seeds and other texts or prompts. Left: how much worse "
    "short texts are read than by the original (nats a token; left is better): choose methods that stay near 0. Right: "
    "the longest prompts answered (right is better). Where lines overlap, look at the claims below: they are paired."
)


def write_report(study: StudyFile, rows: Rows, verdicts: Sequence[Verdict], command: str) -> str:
    """Writes all files to the study's folder; returns the tables for a console."""
    runs, claims = table(rows), verdict_table(verdicts)
    page = Study(
        kind=KIND,
        title=study.title,
        notes=[*_notes(study, rows, verdicts), f"Made by: {command}"],
        table=runs,
        figures=[Plot(_figure(rows), CAPTION)],
        results={
            "rows": {name: [asdict(each) for each in models] for name, models in rows.items()},
            "claims": [each.ordering.model_dump() | asdict(each.gain) | {"here": each.word} for each in verdicts],
        },
        more_tables=[claims] if verdicts else [],
    )
    page.write(study.report_dir)
    text = markdown(runs) + ("\n" + markdown(claims) if verdicts else "")
    write_text(study.report_dir / TABLE, text)
    return text


def _notes(study: StudyFile, rows: Rows, verdicts: Sequence[Verdict]) -> list[str]:
    one = next(iter(rows.values()))[0]
    longest = max(one.prompts)
    counts = [sum(each.word == word for each in verdicts) for word in ("shown", "not shown", "opposite")]
    notes = [
        f"Loss in nats a token on windows of {len(one.short)} short and {len(one.long)} long texts; "
        f"{len(one.prompts[longest])} prompts a length, in {study.evaluation.prompt_sets} independent sets.",
        "In brackets: 95 % intervals over seeds and texts or prompts. Changes are against the original, text by text.",
    ]
    if verdicts:
        notes.append(
            f"Of {len(verdicts)} claims {counts[0]} are shown, {counts[1]} not shown, {counts[2]} opposite. A gain is "
            "that of the first over the second, paired by seed and text or prompt; its interval decides. Of 20 ties, "
            "one is expected to be called shown or opposite."
        )
    return notes


def _figure(rows: Rows) -> str:
    found = {name: changes(rows, name) for name in rows}
    longest = max(next(iter(rows.values()))[0].prompts)
    panels = {"short loss against the original": "short", f"answered at {longest:,} tokens": f"@{longest}"}
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.4, 1.4 + 0.3 * len(rows)), layout="constrained")
        for number, axes in enumerate(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]):
            title = list(panels)[number]
            axes.set_title(title)
            _draw(axes, {name: each[panels[title]] for name, each in found.items()}, MODEL_COLOURS[number + 1])
        axes.invert_yaxis()
        return svg_of(figure, "study")


def _draw(axes: Axes, estimates: Mapping[str, Estimate], colour: str) -> None:
    means = [each.mean for each in estimates.values()]
    ends = [
        [each.mean - each.low for each in estimates.values()],
        [each.high - each.mean for each in estimates.values()],
    ]
    axes.errorbar(means, list(estimates), xerr=ends, fmt="o", color=colour, markersize=5, capsize=2)
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=":")
