"""What the shipped recipes say of their plans is what the planner says."""

from pathlib import Path

import pytest

from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.plan import GIB, plan_phase
from longred_megatron.recipe import load_recipe, read_phases
from tests.training.test_rehearsal import RECIPES, hf_overrides

ON_GPUS = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith(("tiny", "smollm2"))]
NUM_GPUS = 8


@pytest.mark.parametrize("name", [name for name in ON_GPUS if name != "llama3_8b_32k"])  # that one is others' base
def test_the_comment_is_true(name: str, tmp_path: Path) -> None:
    path = RECIPES / f"{name}.yaml"
    phases = read_phases(load_recipe(path, hf_overrides(name, tmp_path)))
    plans = [plan_phase(phase, NUM_GPUS, read_gpu("h100-80gb")) for phase in phases]
    assert all(plan.fits for plan in plans)
    size, hours = max(plan.needed_bytes for plan in plans) / GIB, sum(plan.hours for plan in plans)
    comment = (
        f"# Planned on {NUM_GPUS} H100-80GB: {size:.1f} GiB a rank, {hours:.2g} hours (tools/plan.py; not measured).\n"
    )
    assert comment in path.read_text(), f"write into {path.name}: {comment}"
