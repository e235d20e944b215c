"""Seconds of a step's parts, on layouts where one part decides."""

from pathlib import Path
from typing import Any

import pytest

from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.operations import FUSED, Numbers, Tokens, Widths
from longred_megatron.planning.plan import plan_phase
from longred_megatron.recipe import load_recipe, read_phases
from tests.training.workspace import make_workspace

SIZES: dict[str, Any] = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
MICROBATCHES = 6
OPERATIONS = len(FUSED.layer(Widths(1, 1, 1, 1, 1, 1, False), Tokens(1, 1, 1), Numbers(2, 2, 0, 2, 2)))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"precision": {"params": "bf16"}, "step": {"tokens_per_microbatch": 512}}
    return make_workspace(tmp_path_factory.mktemp("timing"), "llama_3", SIZES, **settings)


@pytest.mark.parametrize("recompute, passes", [("none", 3), ("full", 4)])
def test_a_small_model_waits_for_its_host(recipe: Path, recompute: str, passes: int) -> None:
    """Forward, twice as many operations backward, and forward once more; the objectives' teachers come on top."""
    gpu = read_gpu("h100-80gb").model_copy(update={"operation_host_seconds": 1.0, "step_host_seconds": 5.0})
    [phase] = read_phases(load_recipe(recipe, [f"training.recompute={recompute}"]))
    plan = plan_phase(phase, 1, gpu)
    student = MICROBATCHES * SIZES["num_hidden_layers"] * OPERATIONS * passes
    teacher = plan.seconds_by_part["teacher"]
    assert teacher > 2 * OPERATIONS
    assert plan.step_seconds == pytest.approx(student + teacher + 5.0, rel=1e-3)
    assert sum(plan.seconds_by_part.values()) == pytest.approx(plan.step_seconds)
