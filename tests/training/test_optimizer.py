from pathlib import Path

import pytest
import torch

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.recipe import Optimizer
from longred_megatron.training.optimizer import learning_rate, set_hyperparameters
from tests.training.workspace import build_run, make_workspace


def rates(num_steps: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"lr": 1.0} | settings)
    return [learning_rate(optimizer, step, num_steps) for step in range(1, num_steps + 1)]


def test_constant_is_the_default() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_minimum(schedule: str) -> None:
    values = rates(11, schedule=schedule, warmup_steps=1, min_lr=0.1)
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    assert values[5] == pytest.approx(0.55)  # half-way, both pass the middle
    assert (values[2] > 0.9) == (schedule == "cosine")


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms(tmp_path: Path) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.5}
    recipe = make_workspace(tmp_path, model="llama_biases", precision={"params": "bf16"}, optimizer=settings)
    groups = initialize(Parallel(), seed=1)
    try:
        run = build_run(recipe, groups)
        before = {name: p.detach().float() for chunk in run.chunks for name, p in chunk.named_parameters()}
        run.optimizer.zero_grad()
        set_hyperparameters(run.optimizer, run.phase.recipe.optimizer, step=1, num_steps=10)
        run.optimizer.step()  # every gradient is zero, so decay alone moves the weights: by 1 - 0.1 x 0.5
        after = {name: p.detach().float() for chunk in run.chunks for name, p in chunk.named_parameters()}
    finally:
        destroy()
    assert any(name.endswith("bias") for name in before) and any("norm" in name for name in before)
    for name, weights in before.items():
        expected = 0.95 * weights if weights.dim() > 1 else weights
        torch.testing.assert_close(after[name], expected, rtol=2**-8, atol=0, msg=name)
