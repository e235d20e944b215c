"""A checkpoint of a machine with Transformer Engine goes on without it, and the other way round.

Stand-ins show what differs in a checkpoint: modules with an `_extra_state`, as all of Transformer Engine's have, and an
Adam with the groups of its FusedAdam (transformer_engine/pytorch/optimizers/fused_adam.py, read).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron.core.optimizer
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import distrib_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.checkpoint import distributed
from longred_megatron.model import plain_layers
from longred_megatron.training.optimizer import set_hyperparameters
from longred_megatron.training.run import PhaseRun
from tests.training.workspace import build_run, make_workspace


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose groups count the steps; has `bias_correction` in its groups and reads it, and no other switches."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool, capturable: bool
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(
            params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int  # the kernel takes no other
            first, second = (1 - beta ** group["step"] if group["bias_correction"] else 1 for beta in group["betas"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - group["betas"][1])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = (state["exp_avg_sq"] / second).sqrt() + group["eps"]
                parameter.addcdiv_(state["exp_avg"] / first, scale, value=-group["lr"])


@contextmanager
def transformer_engine(is_there: bool = True) -> Iterator[None]:
    """What a checkpoint sees of a machine that has it."""
    if not is_there:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plain_layers.RMSNorm, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8), raising=False
        )
        patch.setattr(plain_layers.RMSNorm, "set_extra_state", lambda self, state: None, raising=False)
        patch.setattr(megatron.core.optimizer, "Adam", FusedAdam)
        patch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        for name in ("state_dict", "load_state_dict"):  # without what the shim does for torch's AdamW
            method = getattr(distrib_optimizer.DistributedOptimizer, name)
            original = inspect.getclosurevars(method).nonlocals[name]
            patch.setattr(distrib_optimizer.DistributedOptimizer, name, original)
        yield


@pytest.fixture
def train(tmp_path: Path, groups: ProcessGroupCollection) -> Callable[..., PhaseRun]:
    """A function that trains some steps, from a checkpoint or from the start, and returns the run."""
    recipe = make_workspace(tmp_path, precision={"params": "bf16"})

    def run_steps(steps: range, resume: Path | None = None) -> PhaseRun:
        run = build_run(recipe, groups)
        if resume:
            distributed.load(resume, run.chunks, run.optimizer)
        for step in steps:
            set_hyperparameters(run.optimizer, run.phase.recipe.optimizer, step, 6)
            run.train_step(run.data.step(step, 0, 1))
        return run

    return run_steps


def save(run: PhaseRun, path: Path) -> Path:
    description = {"architecture": asdict(run.student), "source_hf": "", "dtype": "bf16"}
    distributed.save(path, run.chunks, description, run.optimizer)
    return path


def weights(run: PhaseRun) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in run.chunks[0].parameters()])


def test_the_stand_ins_differ_in_the_checkpoint(train: Callable[..., PhaseRun]) -> None:
    with transformer_engine():
        run = train(range(1, 2))
        entries = run.chunks[0].sharded_state_dict()
        assert any(isinstance(entry, ShardedObject) for name, entry in entries.items() if "final_layernorm" in name)
    assert "bias_correction" in run.optimizer.param_groups[0]
    assert "bias_correction" not in train(range(1, 2)).optimizer.param_groups[0]


@pytest.mark.parametrize("saved_with", [True, False])
@pytest.mark.parametrize("loaded_with", [True, False])
def test_three_steps_and_three_on_the_other_machine_equal_six(
    saved_with: bool, loaded_with: bool, train: Callable[..., PhaseRun], tmp_path: Path
) -> None:
    with transformer_engine(loaded_with):
        expected = weights(train(range(1, 7)))
    with transformer_engine(saved_with):
        checkpoint = save(train(range(1, 4)), tmp_path / "checkpoint")
    with transformer_engine(loaded_with):
        run = train(range(4, 7), checkpoint)
        again = weights(train(range(0), checkpoint))
    found = weights(run)
    assert (again - expected).norm() > 1e-3 * expected.norm()  # the last steps are to be seen
    if saved_with == loaded_with:
        assert torch.equal(found, expected)
    assert (found - expected).norm() < 1e-4 * expected.norm()
