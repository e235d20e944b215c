"""What a comparison found: times, rates, ratios, memory, and how near the machine's peak both sides came."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """One side. seconds: of each repeat, in order. peak_bytes: of memory, see `process`; with ranks, the largest.
    work, flops: of a repeat, see `base.Case`."""

    seconds: Sequence[float]
    peak_bytes: int
    work: float
    flops: float | None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rates(self) -> list[float]:
        """Work a second, of each repeat."""
        return [self.work / seconds for seconds in self.seconds]


@dataclass(frozen=True)
class Result:
    """Of one case. unit: of work. peak_flops: FLOP/s of a matrix product on one device; ours_devices: of our side.

    facts: what both sides computed in their first repeat, ours first.
    problem: why there are no times: a side failed, or the two computed different things; empty: there are.
    """

    comparison: str
    setting: str
    unit: str
    peak_flops: float | None
    ours_devices: int
    facts: Mapping[str, tuple[float, float]]
    ours: Timed
    reference: Timed
    problem: str = ""

    @property
    def ratios(self) -> list[float]:
        """Our speed in parts of the reference's, of each pair of repeats: what disturbs both cancels out."""
        return [ours / theirs for ours, theirs in zip(self.ours.rates, self.reference.rates, strict=True)]

    @property
    def ratio(self) -> float:
        """Above 1: ours is faster."""
        return statistics.median(self.ratios)

    @property
    def memory_ratio(self) -> float | None:
        """Below 1: ours needs less. None where the reference needs none to speak of."""
        return self.ours.peak_bytes / self.reference.peak_bytes if self.reference.peak_bytes > 0 else None

    @property
    def shares_of_peak(self) -> tuple[float | None, float | None]:
        """Ours and the reference's part of the matrix product's rate, by the median time; None where products are not
        what it is made of."""
        return self._share(self.ours, self.ours_devices), self._share(self.reference, 1)

    def _share(self, side: Timed, devices: int) -> float | None:
        if side.flops is None or self.peak_flops is None:
            return None
        return side.flops / side.median_seconds / self.peak_flops / devices

    def as_json(self) -> dict[str, Any]:
        """All fields, and what is derived from them."""
        if self.problem:
            return asdict(self)
        derived = {
            "ratio": self.ratio,
            "memory_ratio": self.memory_ratio,
            "ours_rate": statistics.median(self.ours.rates),
            "reference_rate": statistics.median(self.reference.rates),
            "ours_share_of_peak": self.shares_of_peak[0],
            "reference_share_of_peak": self.shares_of_peak[1],
        }
        return asdict(self) | derived

    def row(self) -> list[str]:
        """A line of the table, see `HEAD`."""
        if self.problem:
            return [self.comparison, self.setting, self.problem, *[""] * (len(HEAD) - 3)]
        memory = [f"{side.peak_bytes / 2**20:,.0f}" for side in (self.ours, self.reference)]
        ratio = self.memory_ratio
        return [
            self.comparison,
            self.setting,
            *(_spread(side.rates, f" {self.unit}/s") for side in (self.ours, self.reference)),
            _spread(self.ratios, ""),
            *memory,
            "" if ratio is None else f"{ratio:.2f}",
            *(_percent(share) for share in self.shares_of_peak),
        ]


HEAD = [
    "comparison",
    "setting",
    "ours",
    "reference",
    "speed ratio",
    "ours, MiB",
    "reference, MiB",
    "memory ratio",
    "ours, of peak",
    "reference, of peak",
]


def markdown(results: Sequence[Result]) -> str:
    """The table, as in docs/performance.md."""
    rows = [HEAD, ["---"] * len(HEAD), *(result.row() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _spread(values: Sequence[float], unit: str) -> str:
    """Median, and the least and the most."""
    low, middle, high = (_shown(each) for each in (min(values), statistics.median(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"


def _shown(value: float) -> str:
    """Three digits, or more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
