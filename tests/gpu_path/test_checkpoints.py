"""Fused Adam's state in checkpoints, over Transformer Engine and across machines."""

from tests.gpu_path import install, ranks

# isort: split

from pathlib import Path

import pytest

from tests.gpu_path.references import run_on_cpu
from tests.layouts.ranks import Case
from tests.layouts.table import CHANGES, SIZES
from tests.training.workspace import make_workspace

pytestmark = install.needs_plain_kernels
TOLERANCE = 1e-5


def test_three_steps_and_three_are_six(tmp_path: Path) -> None:
    """In another layout: the first saves after its first step, the others go on from there."""
    recipe = make_workspace(tmp_path / "workspace", "llama_3", SIZES, **CHANGES)
    whole = Case("whole", 2, recipe, ("parallel.tensor=2",), steps=range(1, 5), save=tmp_path / "checkpoint")
    outcomes = dict(ranks.run_all([whole], tmp_path))
    resumed = [
        Case(name, world, recipe, overrides, steps=range(2, 5), resume=tmp_path / "checkpoint")
        for name, world, overrides in (("same", 2, whole.overrides), ("pipeline", 2, ("parallel.pipeline=2",)))
    ]
    outcomes |= ranks.run_all(resumed, tmp_path)
    for case in resumed:
        assert max(outcomes[case.name].difference(outcomes["whole"].last(3)).values()) < TOLERANCE, case.name


def test_fp8_goes_on_with_its_scales(tmp_path: Path) -> None:
    """With delayed scaling: on two replicas with the same bits, in other layouts to bf16's rounding; without, not."""
    recipe = make_workspace(tmp_path / "workspace", "llama_3", SIZES, **CHANGES)
    fp8 = ("precision={params: bf16, fp8: hybrid, fp8_recipe: delayed}",)
    whole = Case("whole", 2, recipe, fp8, steps=range(1, 5), save=tmp_path / "checkpoint")
    outcomes = dict(ranks.run_all([whole], tmp_path))
    resumed = [
        Case(name, 2, recipe, (*fp8, *layout), sabotage, steps=range(2, 5), resume=tmp_path / "checkpoint")
        for name, layout, sabotage in (
            ("same", (), None),
            ("tensor", ("parallel.tensor=2", "parallel.sequence=true"), None),
            ("pipeline", ("parallel.pipeline=2",), None),
            ("lost", (), "scales_lost"),
        )
    ]
    outcomes |= ranks.run_all(resumed, tmp_path)
    apart = {case.name: max(outcomes[case.name].difference(outcomes["whole"].last(3)).values()) for case in resumed}
    assert apart["same"] == 0 < max(apart["tensor"], apart["pipeline"]) < 0.02 < apart["lost"], apart


@pytest.mark.parametrize("to_gpu", [True, False], ids=["to a GPU", "to a CPU"])
def test_a_run_goes_on_on_the_other_machine(to_gpu: bool, tmp_path: Path) -> None:
    first, second = (run_on_cpu, ranks.run_all) if to_gpu else (ranks.run_all, run_on_cpu)
    recipe = make_workspace(tmp_path / "workspace", "llama_3", SIZES, **CHANGES)
    whole = Case("whole", 1, recipe, steps=range(1, 5), save=tmp_path / "checkpoint")
    resumed = Case("resumed", 1, recipe, steps=range(2, 5), resume=tmp_path / "checkpoint")
    wanted = first([whole], tmp_path)["whole"].last(3)
    assert max(second([resumed], tmp_path)["resumed"].difference(wanted).values()) < TOLERANCE
