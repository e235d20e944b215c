"""`training.trainable`: the rest of the model stays as it was, bit for bit, in any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file

from tests.layouts.ranks import Case, run_all
from tests.objectives.references import step_loss
from tests.training.workspace import build_run, make_workspace

PARTS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "norm": ("norm",),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
}
CHANGES: dict[str, Any] = {"optimizer": {"lr": 0.5, "eps": 1.0}}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_part_learns_and_its_gradients_are_those_of_plain_torch(
    part: str, tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(make_workspace(tmp_path), groups, f"training.trainable=[{part}]", "training.recompute=full")
    microbatches = run.data.step(1, 0, 1)
    _, gradients = step_loss(run, microbatches)
    result = run.train_step(microbatches)
    own = [g for name, g in gradients.items() if any(word in name for word in PARTS[part])]
    norm = float(sum(g.double().square().sum() for g in own)) ** 0.5
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    trained = sum(p.numel() for chunk in run.chunks for p in chunk.parameters() if p.requires_grad)
    assert trained == sum(g.numel() for g in own)


@pytest.mark.parametrize("model", ["llama_3", "qwen3_tied"])
def test_in_layouts_and_after_a_restart(model: str, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path / "workspace", model, **CHANGES)
    only = ("training.trainable=[attention]",)
    layouts = {
        "tensor": ("parallel.tensor=2", "parallel.sequence=true", "training.recompute=full"),
        "pipeline": ("parallel.pipeline=2", "training.recompute=full"),
        "data": (),
    }
    checkpoint = tmp_path / "checkpoint"
    cases = [Case("one", 1, recipe, only, save=checkpoint)]
    cases += [Case(name, 2, recipe, (*only, *layout)) for name, layout in layouts.items()]
    outcomes = dict(run_all(cases, tmp_path))
    for name in layouts:
        assert max(outcomes[name].difference(outcomes["one"]).values()) < 1e-5
    again = run_all(
        [Case("again", 2, recipe, (*only, *layouts["pipeline"]), steps=range(2, 3), resume=checkpoint)], tmp_path
    )
    assert max(again["again"].difference(outcomes["one"].last(1)).values()) < 1e-5
    source = load_file(tmp_path / "workspace" / "model" / "model.safetensors")
    for name, tensor in outcomes["pipeline"].weights.items():
        learns = any(word in name for word in PARTS["attention"])
        assert torch.equal(tensor, source[name]) != learns, name
