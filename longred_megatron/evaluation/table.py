"""Tables of figures with their intervals, for the terminal and the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longred_megatron.evaluation.intervals import Interval


@dataclass(frozen=True)
class Cell:
    """A figure of a table, ready to print, and its interval or nothing."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a table. explanation: one sentence for the page."""

    title: str
    explanation: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """about: what it means and what to do about it, for the page; columns: that of the rows' names first."""

    title: str
    about: str
    columns: tuple[Column, ...]


def aligned(columns: Sequence[Column]) -> list[str]:
    """Lines of plain text, intervals in brackets."""
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


def between(interval: Interval | None, shown: Callable[[float], str]) -> str:
    """Both ends; units that both carry are said once."""
    if interval is None:
        return ""
    low, high = shown(interval.low), shown(interval.high)
    return f"{low.removesuffix(' %')} to {high}" if high.endswith(" %") else f"{low} to {high}"


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
