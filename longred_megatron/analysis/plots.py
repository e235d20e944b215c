"""Lines and grids of the studies' pages."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from longred_megatron.evaluation.plots import HEAT
from longred_megatron.page import INK, MARKERS, MODEL_COLOURS, STYLE, Plot, svg_of

# From -1 over 0 to 1, for cosines.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#a4480a", "#f2c894", "#f3ece2", "#7fb8a4", "#0b4a55"])

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> x and y."""


def lines(
    panels: Mapping[str, Series], name: str, xlabel: str, caption: str, mark: float | None = None,
    whole_numbers: bool = True,
) -> Plot:  # fmt: skip
    """One panel for each title, side by side.

    name: unique on the page. mark: an x with a dotted line. whole_numbers: whether only those are marked on the x axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.6), layout="constrained")
        for axes, (title, series) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for order, (label, (x, y)) in enumerate(series.items()):
                style = {"color": MODEL_COLOURS[order % len(MODEL_COLOURS)], "marker": MARKERS[order % len(MARKERS)]}
                axes.plot(x, y, label=label, markersize=4.5, **style)
            axes.set_title(title)
            axes.set_xlabel(xlabel)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_numbers))
            if mark is not None:
                axes.axvline(mark, color=INK, linewidth=0.9, linestyle=":")
            if len(series) > 1:
                axes.legend(frameon=False, fontsize=9)
        return Plot(svg_of(figure, name), caption)


def bars(values: Mapping[str, Mapping[str, float]], name: str, caption: str) -> Plot:
    """One panel for each title, with a horizontal bar for each label, the same in all."""
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        labels = list(next(iter(values.values())))
        figure = Figure(figsize=(10.4, 1.4 + 0.32 * len(labels)), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, len(values), squeeze=False, sharey=True)[0]):
            title, series = list(values.items())[i]
            axes.barh(labels, list(series.values()), color=MODEL_COLOURS[i], height=0.6)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.invert_yaxis()
        return Plot(svg_of(figure, name), caption)


def grids(
    panels: Mapping[str, Tensor], name: str, labels: tuple[str, str], caption: str, ends: Sequence[float] | None = None,
    first_column: int = 1, signed: bool = False,
) -> Plot:  # fmt: skip
    """Matrices [rows, columns] as colours, one panel for each title, with one scale.

    labels: of columns and rows. ends: of both, where they are bins of something else; else rows are numbered from 1 and
    columns from `first_column`. signed: values from -1 to 1.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(10.4, 4.2 if len(panels) < 3 else 3.4), layout="constrained")
        most = 1.0 if signed else max(values.max().item() for values in panels.values())
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
            scale = {"cmap": SIGNED, "vmin": -1, "vmax": 1} if signed else {"cmap": HEAT, "vmin": 0, "vmax": most or 1}
            image = _draw(axes, values, ends, first_column, scale)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(8 if len(panels) < 3 else 5, integer=True))
            axes.set_title(title)
            axes.set_xlabel(labels[0])
        all_axes[0].set_ylabel(labels[1])
        figure.colorbar(image, ax=all_axes, shrink=0.9)
        return Plot(svg_of(figure, name), caption)


def _draw(axes: Axes, values: Tensor, ends: Sequence[float] | None, first_column: int, scale: dict[str, Any]) -> Any:
    rows, columns = values.shape
    if ends is not None:
        across = down = list(ends)
    else:
        across, down = ([first - 0.5 + i for i in range(n + 1)] for first, n in ((first_column, columns), (1, rows)))
    image = axes.pcolormesh(across, down, values.numpy(), edgecolors="none", rasterized=True, **scale)
    axes.spines[:].set_visible(False)
    return image
