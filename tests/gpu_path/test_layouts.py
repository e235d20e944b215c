"""Whole steps over Transformer Engine, in layouts, equal one rank on the CPU path: losses, gradients, updates."""

from tests.gpu_path import ranks

# isort: split

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.gpu_path.references import LAYOUTS, RECIPES, write_references
from tests.layouts.ranks import Outcome, _outcome
from tests.layouts.table import Layout, cases, recipes_in

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Outcome], Path]:
    folder = tmp_path_factory.mktemp("layouts")
    write_references(folder)
    (folder / "gpu").mkdir()
    return ranks.run_all(cases(LAYOUTS, recipes_in(folder / RECIPES)), folder / "gpu"), folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_is_that_of_the_cpu_path(layout: Layout, outcomes: tuple[Mapping[str, Outcome], Path]) -> None:
    over_transformer_engine, folder = outcomes
    reference = _outcome(folder / layout.reference.name)
    assert max(over_transformer_engine[layout.name].difference(reference).values()) < TOLERANCE
