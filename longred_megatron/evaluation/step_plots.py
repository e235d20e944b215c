"""Scores of a run's checkpoints against training steps."""

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from longred_megatron.evaluation.intervals import Interval
from longred_megatron.evaluation.plots import draw_band, line_of, panels
from longred_megatron.evaluation.report import ModelReport, Report
from longred_megatron.page import REFERENCE_COLOUR, STYLE, svg_of


@dataclass(frozen=True)
class _Panel:
    """One figure of a model and its interval; None where the model has none."""

    title: str
    is_share: bool
    of: Callable[[ModelReport], tuple[float, Interval | None] | None]


def steps_figure(report: Report) -> str:
    """A panel for each figure of the summary: a line for each run with its intervals, the reference dashed."""
    found = _panels(report)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(found), height=3.1)
        for panel, each in zip(found, axes, strict=True):
            _draw(each, panel, report)
        return svg_of(figure, "steps")


def _draw(axes: Axes, panel: _Panel, report: Report) -> None:
    if theirs := panel.of(report.reference):
        axes.axhline(theirs[0], color=REFERENCE_COLOUR, linewidth=2.0, linestyle=(0, (4, 2)), zorder=2)
    for last in report.shown:
        models = [model for model in report.models if model.run == last.run and model.run is not None]
        points = [(model.step, *value) for model in models if (value := panel.of(model)) is not None]
        if points:
            steps, values, intervals = (list(column) for column in zip(*points, strict=True))
            line = line_of(report, last)
            axes.plot(steps, values, **line)
            draw_band(axes, steps, intervals, line)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if panel.is_share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _panels(report: Report) -> list[_Panel]:
    def at_longest(name: str) -> Callable[[ModelReport], tuple[float, Interval | None] | None]:
        def value(model: ModelReport) -> tuple[float, Interval | None] | None:
            for each in model.by_length:
                if each.name == name:
                    return each.scores[each.longest], each.intervals[each.longest]
            return None

        return value

    return [
        _Panel("Short perplexity", False, lambda model: (model.short.perplexity, model.short.perplexity_interval)),
        _Panel("Long perplexity", False, lambda model: (model.long.perplexity, model.long.perplexity_interval)),
        _Panel("Similarity", False, lambda model: (model.similarity.mean, None) if model.similarity else None),
        *(
            _Panel(f"{scores.name} at {scores.longest:,}", True, at_longest(scores.name))
            for scores in report.reference.by_length
        ),
    ]
