"""Casts to FP8 under Transformer Engine's own recipes: a linear layer, forward and backward."""

from tests.gpu_path import install

# isort: split


from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformer_engine.common import recipe
from transformer_engine.pytorch import Linear, autocast
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import FUSED
from longred_megatron.precision import Precision
from tests.layouts.table import CHANGES, SIZES
from tests.training.workspace import build_run, make_workspace

pytestmark = install.needs_plain_kernels
RECIPES = {
    "delayed": recipe.DelayedScaling(amax_history_len=4),
    "tensorwise": recipe.Float8CurrentScaling(),
    "blockwise": recipe.Float8BlockScaling(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_layer_is_near_its_own_in_fp32(name: str) -> None:
    torch.manual_seed(1)
    FP8GlobalStateManager.reset()
    layer = Linear(256, 128, params_dtype=torch.float32)
    x, weight = torch.randn(32, 256, requires_grad=True), torch.randn(32, 128)
    for _ in range(3):  # delayed scaling knows its scales after a step
        layer.zero_grad()
        x.grad = None
        with autocast(enabled=True, recipe=RECIPES[name]):
            out = layer(x)
        out.backward(weight)
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
    gradients = torch.autograd.grad(wanted, [x, layer.weight], weight)
    for ours, theirs in ((out, wanted), (x.grad, gradients[0]), (layer.weight.grad, gradients[1])):
        assert 1e-3 < distance(ours, theirs) < 0.08  # rounded, and not more


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, by the norm."""
    return float(((ours.float() - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("planted", [False, True])
def test_a_student_in_fp8_has_a_teacher_in_bf16(
    planted: bool, tmp_path: Path, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a teacher that gets the student's precision is seen."""
    if planted:
        monkeypatch.setattr(Precision, "of_teacher", lambda self: self)
    precision = {"params": "bf16", "fp8": "hybrid"}
    run = build_run(make_workspace(tmp_path, "llama_3", SIZES, **CHANGES, precision=precision), groups)
    casts: list[int] = []
    for chunk in (chunk for chunks in run.train_step.teachers.models.values() for chunk in chunks):
        chunk.register_forward_pre_hook(lambda *_: casts.append(-install.calls["quantize"]))
        chunk.register_forward_hook(lambda *_: casts.append(install.calls["quantize"]))
    run.train_step.forward_backward(run.data.step(1, 0, 1))
    assert casts and install.calls["quantize"] > 0
    assert (sum(casts) > 0) == planted


@pytest.mark.parametrize("settings", [{}, {"fp8_recipe": "delayed"}, {"teacher_fp8": True}])
def test_planned_copies_of_weights_are_kept(
    settings: dict[str, object], tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    precision = {"params": "bf16", "fp8": "hybrid", **settings}
    run = build_run(make_workspace(tmp_path, "llama_3", SIZES, **CHANGES, precision=precision), groups)
    run.train_step(run.data.step(1, 0, 1))
    teachers = [chunk for chunks in run.train_step.teachers.models.values() for chunk in chunks]
    kept = [copy for chunk in (*run.chunks, *teachers) for m in chunk.modules() for copy in _copies(m)]
    planned = StageMemory(run.phase, 1, 0, FUSED).resident["fp8 weights"]
    assert sum(each.nbytes for each in kept) == planned > 0


def _copies(module: torch.nn.Module) -> list[Tensor]:
    """FP8 numbers that a module keeps of its weights, as they are and transposed."""
    cached = getattr(module, "_fp8_workspaces", {}).values()
    return [x for each in cached for x in (each._data, each._transpose) if x is not None]
