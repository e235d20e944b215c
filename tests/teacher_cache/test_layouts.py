"""What one layout keeps of a teacher any other reads: the same step, and no teacher runs."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.layouts.ranks import Case, Outcome, run_all
from tests.objectives.examples import all_kinds
from tests.training.workspace import make_workspace

LAYOUTS = {
    "one": (1, ()),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "data": (2, ()),
    "all": (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2")),
}
REPLACED = ("long_text", "short_to_long", "short_restoration")  # the workspace's
STEPS = range(1, 2)
TOLERANCES = {"losses": 5e-5, "grad_norm": 1e-5, "weights": 1e-5}  # a divergence of 1e-3 has fp32's cancellation


def cases(recipe: Path, folder: Path) -> list[Case]:
    """Each layout without a cache, filling one of its own, and reading its own, that of `one`, and that of `all`."""
    found = []
    for name, (world, overrides) in LAYOUTS.items():
        found.append(Case(f"{name}-live", world, recipe, overrides, steps=STEPS))
        found.append(Case(f"{name}-fills", world, recipe, (*overrides, f"teacher.cache={folder}/{name}"), steps=STEPS))
        for source in dict.fromkeys((name, "one", "all")):
            read = (*overrides, f"teacher.cache={folder}/{source}")
            found.append(Case(f"{name}-reads-{source}", world, recipe, read, "teacher_asked", STEPS))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    folder = tmp_path_factory.mktemp("cache")
    objectives = all_kinds(4)
    for number, settings in enumerate(objectives.values()):
        # Context ranks cut some sequences and hold others whole.
        settings["whole_sequences"] = settings.get("mask_documents", False) or number % 2 == 0
    recipe = make_workspace(
        folder, objectives=dict.fromkeys(("long_text", "short_to_long", "short_restoration")) | objectives
    )
    every = cases(recipe, folder)
    # The caches of `one` and `all` are read by every layout.
    first = [case for case in every if case.name in ("one-fills", "all-fills")]
    return {**run_all(first, folder), **run_all([case for case in every if case not in first], folder)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_filling_and_reading_its_own_change_no_bit(layout: str, outcomes: Mapping[str, Outcome]) -> None:
    live = outcomes[f"{layout}-live"]
    for other in (f"{layout}-fills", f"{layout}-reads-{layout}"):
        assert outcomes[other].metrics == live.metrics
        assert outcomes[other].difference(live)["weights"] == 0


@pytest.mark.parametrize("source", ["one", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_another_layout_kept_is_as_good(layout: str, source: str, outcomes: Mapping[str, Outcome]) -> None:
    difference = outcomes[f"{layout}-reads-{source}"].difference(outcomes["one-live"])
    assert all(value < TOLERANCES[what] for what, value in difference.items()), difference
