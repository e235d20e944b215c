"""The report as one HTML page that needs nothing beside itself."""

from pathlib import Path

import jinja2

from longred_megatron.evaluation import plots
from longred_megatron.evaluation.report import ModelReport, Report, all_notes, summary, tables
from longred_megatron.evaluation.step_plots import steps_figure
from longred_megatron.evaluation.table import number, percent, percent_change

# Autoescape: names, paths and notes come from outside.
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["thousands"] = "{:,}".format


def render(report: Report) -> str:
    """The whole page. All text that comes from outside (names, paths, notes) is escaped."""
    return _ENVIRONMENT.get_template("page.html").render(
        report=report,
        columns=summary(report),
        tables=tables(report),
        notes=all_notes(report),
        finding=_finding,
        plots=plots,
        steps_figure=steps_figure,
        variables={name: variable for name, (_, variable) in plots.model_styles(report).items()},
    )


def _finding(model: ModelReport, reference: ModelReport) -> str:
    """One sentence on what a model gained and kept, from the numbers of the summary."""
    parts = []
    theirs_by_name = {theirs.name: theirs.scores for theirs in reference.by_length}
    for ours in model.by_length:
        before = theirs_by_name.get(ours.name, {}).get(ours.longest)
        at = f"{ours.name} at {ours.longest:,} tokens"
        parts.append(f"{at} {'' if before is None else f'{percent(before)} → '}{percent(ours.scores[ours.longest])}")
    for kind, theirs_loss, ours_loss in (
        ("long", reference.long, model.long),
        ("short", reference.short, model.short),
    ):
        parts.append(f"{kind}-text perplexity {number(theirs_loss.perplexity)} → {number(ours_loss.perplexity)}")
    change = percent_change(model.short.perplexity, reference.short.perplexity)
    return f"{'; '.join(parts)} ({change})."
