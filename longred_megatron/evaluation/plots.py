"""The figures of the report."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from longred_megatron.evaluation.by_length import ByLength
from longred_megatron.evaluation.intervals import Interval
from longred_megatron.evaluation.perplexity import LossByPosition, LossDifference
from longred_megatron.evaluation.report import ModelReport, Report
from longred_megatron.evaluation.tasks.results import TaskResult
from longred_megatron.page import INK, MARKERS, MODEL_COLOURS, REFERENCE_COLOUR, STYLE, VARIABLES, svg_of

MOST_COLUMNS = 3  # panels in a row of a figure
# From "nothing found" to "all found": light to dark of one hue, so it reads in grey too.
HEAT = LinearSegmentedColormap.from_list("heat", ["#f3ece2", "#f2c894", "#7fb8a4", "#1f7a78", "#0b4a55"])


def model_styles(report: Report) -> dict[str, tuple[str, str]]:
    """(colour, CSS variable) by model name: the reference neutral, the others in a fixed order, repeating
    after the eighth."""
    styles, index = {}, 0
    for model in report.models:
        colour = REFERENCE_COLOUR
        if not model.is_reference and model in report.shown:
            colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
            index += 1
        styles[model.name] = (colour, VARIABLES[colour])
    return styles


def loss_figure(report: Report) -> str:
    """Loss by position: short texts at the original window, long texts at the extended one."""
    with matplotlib.rc_context(STYLE):
        figure, short, long = _short_and_long(report, height=3.9)
        for model in report.shown:
            _draw_losses(short, report, model, model.short)
            _draw_losses(long, report, model, model.long)
        short.set_ylabel("loss (nats a token)")
        return svg_of(figure, "loss")


def _short_and_long(report: Report, height: float) -> tuple[Figure, Axes, Axes]:
    """A figure of so many inches with two panels by position: of short texts, and of long ones."""
    figure = Figure(figsize=(10.4, height), layout="constrained")
    short, long = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for axes, kind, window in ((short, "Short", report.original_window), (long, "Long", report.extended_window)):
        axes.set_title(f"{kind} texts, window {window:,}")
        axes.set_xlabel("position in the window (tokens)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if report.extended_window > report.original_window:
        _mark_original_window(long, report)
    return figure, short, long


def _draw_losses(axes: Axes, report: Report, model: ModelReport, losses: LossByPosition | LossDifference) -> None:
    positions = [(bucket.start + bucket.stop - 1) / 2 for bucket in losses.buckets]
    values = [bucket.loss for bucket in losses.buckets]
    line = line_of(report, model)
    axes.plot(positions, values, **line, markevery=4)
    draw_band(axes, positions, [bucket.interval for bucket in losses.buckets], line)


def change_figure(report: Report) -> str:
    """Loss less the reference's by position, on short and on long texts, with the paired interval as a band."""
    with matplotlib.rc_context(STYLE):
        figure, short, long = _short_and_long(report, height=3.0)
        for axes in (short, long):
            axes.axhline(0, color=REFERENCE_COLOUR, linewidth=2.0, linestyle=(0, (4, 2)), zorder=2)
        for model in report.shown:
            for axes, losses in ((short, model.short), (long, model.long)):
                if losses.against_reference is not None:
                    _draw_losses(axes, report, model, losses.against_reference)
        short.set_ylabel("difference (nats a token)")
        return svg_of(figure, "change")


def draw_band(axes: Axes, x: Sequence[float], intervals: Sequence[Interval | None], line: dict[str, Any]) -> None:
    """The 95 % intervals around a line, where there are any."""
    known = [(at, each.low, each.high) for at, each in zip(x, intervals, strict=True) if each is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=line["color"], alpha=0.16, linewidth=0, zorder=1)


def length_figure(report: Report) -> str:
    """Scores by prompt length with their intervals, one panel a task; a dot for each prompt set."""
    with matplotlib.rc_context(STYLE):
        tasks = report.reference.panels
        figure, all_axes = panels(len(tasks), height=3.5)
        for task, axes in zip(tasks, all_axes, strict=True):
            lengths = set(task.scores)
            for model in report.shown:
                for ours in model.panels:
                    if ours.name == task.name:
                        _draw_scores(axes, ours, line_of(report, model))
                        lengths |= set(ours.scores)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(-0.04, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            axes.set_title(task.title)
            axes.set_xlabel("prompt length (tokens)")
            axes.set_ylabel(task.score_meaning)
            if min(lengths) < report.original_window < max(lengths):
                _mark_original_window(axes, report)
        return svg_of(figure, "length")


def _draw_scores(axes: Axes, scores: ByLength, line: dict[str, Any]) -> None:
    lengths = list(scores.scores)
    axes.plot(lengths, list(scores.scores.values()), **line)
    draw_band(axes, lengths, list(scores.intervals.values()), line)
    dots = {"color": line["color"], "alpha": 0.5, "marker": "o", "markersize": 2.5, "linestyle": "", "clip_on": False}
    for length, sets in scores.sets.items():
        axes.plot([length] * len(sets), sets, **dots)


def heat_figure(model: ModelReport, number: int) -> str:
    """Scores of one model by length and depth, one panel for each task that has depths. `number` keeps the ids of
    several figures apart."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        results = [result for result in model.retrieval if result.depths]
        figure, all_axes = panels(len(results), height=2.9)
        for axes, result in zip(all_axes, results, strict=True):
            _draw_heat(axes, result)
        return svg_of(figure, f"heat{number}")


def panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, at most `MOST_COLUMNS` beside each other. height: of a row, in inches."""
    columns = min(number, MOST_COLUMNS)
    rows = -(-number // columns)
    figure = Figure(figsize=(10.4, height * rows), layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in found[number:]:
        unused.remove()
    return figure, found[:number]


def _draw_heat(axes: Axes, result: TaskResult) -> None:
    accuracy = {(cell.length, cell.depth): cell.accuracy for cell in result.cells}
    grid = [[accuracy[length, depth] for length in result.lengths] for depth in result.depths]
    axes.pcolormesh(grid, cmap=HEAT, vmin=0, vmax=1, edgecolors="none")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            colour = "#ffffff" if value > 0.6 else "#33291c"
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=9.5,
            )
    axes.set_xticks([index + 0.5 for index in range(len(result.lengths))], [f"{length:,}" for length in result.lengths])
    axes.set_yticks(
        [index + 0.5 for index in range(len(result.depths))],
        [f"{100 * depth:.0f} %" for depth in result.depths],
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_title(f"{result.title}, %")
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("depth")


def similarity_figure(report: Report) -> str:
    """Mean cosine similarity to the reference by layer."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.3), layout="constrained")
        axes = figure.subplots()
        for model in report.shown:
            if model.similarity is not None:
                values = model.similarity.by_layer
                axes.plot(range(len(values)), values, **line_of(report, model))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
        axes.set_xlabel("layer (0 = embeddings)")
        axes.set_ylabel("cosine similarity")
        return svg_of(figure, "similarity")


def line_of(report: Report, model: ModelReport) -> dict[str, Any]:
    """How a model's line looks: the same in every figure; the reference dashed and below the others."""
    return {
        "color": model_styles(report)[model.name][0],
        "marker": MARKERS[report.shown.index(model) % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 2.0,
        "linestyle": (0, (4, 2)) if model.is_reference else "-",
        "zorder": 2 if model.is_reference else 3,
        "clip_on": False,
    }


def _mark_original_window(axes: Axes, report: Report) -> None:
    axes.axvline(report.original_window, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    axes.annotate(
        f"original window {report.original_window:,}",
        (report.original_window, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        fontsize=9,
        va="bottom",
    )
