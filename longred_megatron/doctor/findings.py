"""What a check says: fine, wrong, or not tried and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "not tried"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name: what was looked at, in a few words. text: what was seen, or why it was not tried. change: what to do about it.
    numbers: what was measured, for results.json. trace: the last lines of a process that failed.
    """

    name: str
    status: Status
    text: str
    change: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""


@dataclass(frozen=True)
class Failure:
    """How a rank's process ended before it had a result. trace: the last lines that it wrote."""

    rank: int
    host: str
    text: str
    trace: str = ""


class RanksFailedError(Exception):
    """Processes of a check that failed; the first of them failed first."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__(failures[0].text)
        self.failures = list(failures)


class TimeUpError(Exception):
    """There is no time left for a check."""


def not_tried(name: str, why: str) -> Finding:
    """Nothing was looked at, so nothing is known to be fine."""
    return Finding(name, "not tried", why)


def of_failure(name: str, failures: Sequence[Failure]) -> Finding:
    """A check whose process ended without a result: the first one that failed, and how many followed it."""
    first, others = failures[0], len(failures) - 1
    text = f"rank {first.rank} on {first.host}: {first.text}"
    if others:
        text += f" ({others} other ranks ended after it)"
    change = "read the lines that the rank wrote last (in the page and results.json); mend that machine, or report it"
    return Finding(name, "wrong", text, change, trace=first.trace)
