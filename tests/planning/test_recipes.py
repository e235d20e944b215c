"""What the shipped recipes say of their plans is what the planner says, and their layouts are what it proposes."""

import re
from pathlib import Path

import pytest

from longred_megatron.planning import search
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.plan import GIB, plan_phase
from longred_megatron.recipe import Phase, load_recipe, read_phases
from tests.training.test_rehearsal import RECIPES, hf_overrides

LAYOUTS = sorted((RECIPES / "layouts").glob("*.yaml"))
ON_GPUS = [path for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith(("tiny", "smollm2"))] + LAYOUTS
H100 = read_gpu("h100-80gb")


def phases_of(path: Path, folder: Path) -> list[Phase]:
    return read_phases(load_recipe(path, hf_overrides(path.stem, folder)))


def num_gpus(path: Path) -> int:
    return int(found[1]) if (found := re.search(r"_(\d+)_gpus$", path.stem)) else 8


@pytest.mark.parametrize("path", [path for path in ON_GPUS if path.stem != "llama3_8b_32k"], ids=lambda path: path.stem)
def test_the_comment_is_true(path: Path, tmp_path: Path) -> None:
    plans = [plan_phase(phase, num_gpus(path), H100) for phase in phases_of(path, tmp_path)]
    assert all(plan.fits for plan in plans)
    size, hours = max(plan.needed_bytes for plan in plans) / GIB, sum(plan.hours for plan in plans)
    planned = f"# Planned on {num_gpus(path)} H100-80GB: {size:.1f} GiB a rank, {hours:.2g} hours"
    comment = f"{planned} (tools/plan.py; not measured).\n"
    assert comment in path.read_text(), f"write into {path.name}: {comment}"


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_a_layout_is_the_first_proposal(path: Path, tmp_path: Path) -> None:
    [phase] = phases_of(path, tmp_path)
    eight = RECIPES / f"{path.stem.removesuffix(f'_{num_gpus(path)}_gpus')}.yaml"
    proposed = search.search(phases_of(eight, tmp_path), num_gpus(path), H100).fitting[0].plans[0].phase
    assert phase.recipe == proposed.recipe
