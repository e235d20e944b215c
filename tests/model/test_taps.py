"""Values inside layers equal transformers', and cost the modules no state."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.objectives.base import Tap
from longred_megatron.objectives.needs import What
from tests.objectives.references import extended_student, view
from tests.training.workspace import build_run, make_workspace

WHATS = get_args(What)
CASES = {  # model, override: each way in which a layer's projections, norms, biases and RoPE differ
    "llama_3": "model.rope.theta=1e6",
    "llama_biases": "model.rope.theta=1e6",
    "llama_yarn": "model.rope=none",  # its tables are scaled by an attention factor
    "qwen2": "model.rope.theta=1e6",
    "qwen3_tied": "model.rope.theta=2e6",
}


@pytest.mark.parametrize("model", CASES)
def test_all_values_of_all_layers_equal_transformers(
    model: str, tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(make_workspace(tmp_path, model), groups, CASES[model])
    batch = next(m for m in run.data.step(1, 0, 1) if m.objective == "short_to_long")
    taps = [Tap(layer, what) for layer in (1, 2, 3, 4) for what in WHATS]
    with torch.no_grad():
        output, values = run.chunks[0](batch.tokens, batch.student_positions, taps)
        expected = view(extended_student(run), batch, batch.student_positions)
    assert values.keys() == set(taps)
    for tap, value in values.items():
        wanted = getattr(expected, tap.what)[tap.layer]  # [n, s, hidden], or [n, heads, s, head_dim]
        wanted = wanted.transpose(1, 2) if wanted.dim() == 4 else wanted
        torch.testing.assert_close(value.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5, msg=str(tap))
    torch.testing.assert_close(output, values[Tap(4)])


def test_what_lies_elsewhere_is_ignored(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups)
    batch, *_ = run.data.step(1, 0, 1)
    _, values = run.chunks[0](batch.tokens, batch.student_positions, [Tap(9), Tap(9, "query"), Tap(2, "key")])
    assert values.keys() == {Tap(2, "key")}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_taps_leave_the_output_and_its_gradients_alone(
    recompute: str, tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    run = build_run(make_workspace(tmp_path), groups, f"training.recompute={recompute}")
    batch, *_ = run.data.step(1, 0, 1)
    gradients = []
    for taps in ([], [Tap(layer, what) for layer in (1, 3) for what in WHATS]):
        run.chunks[0].zero_grad()
        output, _ = run.chunks[0](batch.tokens, batch.student_positions, taps)
        output.square().sum().backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in run.chunks[0].parameters() if p.grad is not None)])
    for alone, tapped in zip(*gradients, strict=True):
        assert torch.equal(alone, tapped)
