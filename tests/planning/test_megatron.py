"""The planner against runs that Megatron-LM publishes (golden.yaml); half of them are held out from calibration."""

import statistics
from pathlib import Path

import pytest

from tests.planning.golden import CASES, FACTS, Compared, compare, markdown, summary

DOCS = Path(__file__).parents[2] / "docs/planning.md"


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return [compare(case) for case in CASES]


@pytest.fixture(scope="module")
def held_out(compared: list[Compared]) -> list[Compared]:
    return [each for each in compared if each.case.held_out]


def test_the_halves_are_halves(compared: list[Compared], held_out: list[Compared]) -> None:
    assert len(compared) >= 48 and 0.4 < len(held_out) / len(compared) < 0.6
    left_out = [name for names in FACTS["left_out"].values() for name in names]
    assert not set(left_out) & set(FACTS["cases"]) and len(left_out) == 16


@pytest.mark.parametrize("what", ["resident", "peak"])
def test_memory(what: str, held_out: list[Compared]) -> None:
    errors = [abs(getattr(each, what)) for each in held_out]
    assert statistics.median(errors) <= 0.03 and max(errors) <= 0.1


def test_seconds(held_out: list[Compared]) -> None:
    assert statistics.median(abs(each.seconds) for each in held_out if each.seconds is not None) <= 0.15


def test_the_published_tables(compared: list[Compared]) -> None:
    """A line that differs: write what `python -m tests.planning.golden` prints into the document."""
    lines = DOCS.read_text().splitlines()
    for line in (*summary(compared).splitlines(), *markdown(compared).splitlines()):
        assert line in lines, line
