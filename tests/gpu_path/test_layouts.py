"""Whole steps over Transformer Engine, in layouts, equal one rank on the CPU path: losses, gradients, updates."""

from tests.gpu_path import install, ranks

# isort: split

from collections.abc import Mapping

import pytest

from tests.gpu_path.references import run_on_cpu
from tests.layouts.ranks import Outcome
from tests.layouts.table import Layout, cases, workspaces

pytestmark = install.needs_plain_kernels
TOLERANCE = 1e-5
LAYOUTS = (
    Layout(1, {}),
    Layout(1, {}, recompute="full"),
    Layout(1, {}, recompute="selective"),
    Layout(1, {}, model="biases"),
    Layout(1, {}, model="masked"),
    Layout(1, {}, model="kinds"),
    Layout(2, {}),
    Layout(2, {"tensor": 2, "sequence": True}),
    Layout(2, {"tensor": 2}, model="biases"),
    Layout(2, {"tensor": 2, "sequence": True}, model="tied"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, recompute="full"),
    Layout(2, {"context": 2}),
    Layout(2, {"context": 2}, whole_sequences=True, recompute="full"),
    Layout(2, {"context": 2}, model="masked", recompute="full"),
    Layout(2, {"context": 2}, model="masked", whole_sequences=True),
    Layout(2, {"context": 2}, model="kinds"),
    Layout(2, {"overlap_param_gather": True}),
    Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "overlap_param_gather": True}, model="tied"),
    Layout(4, {"context": 4}),
    Layout(4, {"tensor": 2, "context": 2, "sequence": True}, recompute="full"),
    Layout(4, {"pipeline": 2, "context": 2}, recompute="full"),
)
FAULTS = (
    Layout(2, {"overlap_param_gather": True}, sabotage="head_not_gathered"),
    Layout(2, {"context": 2}, sabotage="neighbouring_pieces"),
    Layout(2, {"context": 2}, sabotage="positions_cut_twice"),
    Layout(1, {}, model="masked", sabotage="border_late_by_one"),
    Layout(2, {"context": 2}, model="masked", sabotage="border_early_by_one"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Outcome], Mapping[str, Outcome]]:
    """(over Transformer Engine, on the CPU)."""
    folder = tmp_path_factory.mktemp("layouts")
    recipes = workspaces(folder)
    (folder / "cpu").mkdir()
    references = run_on_cpu(cases((layout.reference for layout in LAYOUTS), recipes), folder / "cpu")
    return ranks.run_all(cases((*LAYOUTS, *FAULTS), recipes), folder), references


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_is_that_of_the_cpu_path(layout: Layout, outcomes: tuple[Mapping[str, Outcome], ...]) -> None:
    over_transformer_engine, on_cpu = outcomes
    difference = over_transformer_engine[layout.name].difference(on_cpu[layout.reference.name])
    assert max(difference.values()) < TOLERANCE, difference


@pytest.mark.parametrize("layout", FAULTS, ids=lambda layout: str(layout.sabotage))
def test_faults_are_seen(layout: Layout, outcomes: tuple[Mapping[str, Outcome], ...]) -> None:
    over_transformer_engine, on_cpu = outcomes
    difference = over_transformer_engine[layout.name].difference(on_cpu[layout.reference.name])
    assert max(difference.values()) > 100 * TOLERANCE, difference
