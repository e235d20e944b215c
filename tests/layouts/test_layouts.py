"""Every layout equals one process; the comparison sees the faults that layouts are known for."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize
from tests.layouts.ranks import Outcome
from tests.layouts.table import BF16_LAYOUTS, FAULTS, LAYOUTS, Layout, differences, run_table
from tests.training.test_reference_parity import reference
from tests.training.workspace import build_run

TOLERANCE = 1e-5
BF16_TOLERANCE = 2**-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Mapping[str, Outcome]:
    return run_table(folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_gradient_norm_and_weights_are_those_of_one_process(
    layout: Layout, outcomes: Mapping[str, Outcome]
) -> None:
    assert max(differences(layout, outcomes).values()) < TOLERANCE


@pytest.mark.parametrize("layout", BF16_LAYOUTS, ids=lambda layout: layout.name)
def test_bf16_agrees_to_its_own_precision(layout: Layout, outcomes: Mapping[str, Outcome]) -> None:
    assert max(differences(layout, outcomes).values()) < BF16_TOLERANCE


@pytest.mark.parametrize("layout", FAULTS, ids=lambda layout: str(layout.sabotage))
def test_faults_are_seen(layout: Layout, outcomes: Mapping[str, Outcome]) -> None:
    assert max(differences(layout, outcomes).values()) > 100 * TOLERANCE


def test_they_do_not_agree_on_a_wrong_answer(folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    groups = initialize(Parallel(), seed=1)
    try:
        run = build_run(folder / "untied" / "recipe.yaml", groups)
        loss, gradients = reference(run, run.data.step(1, 0, 1))  # plain transformers and torch
    finally:
        destroy()
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    [largest] = [each for each in LAYOUTS if each.world == 8 and each.model == "untied" and each.recompute == "full"]
    first = outcomes[largest.name].metrics[0]
    assert first["loss"] == pytest.approx(float(loss), rel=TOLERANCE)
    assert first["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
