"""Two steps of one recipe in any layout, on real process groups of this machine, and what came out of them."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longred_megatron.checkpoint import distributed, huggingface
from longred_megatron.model.fp8 import forget_models
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.recipe import load_recipe
from longred_megatron.training.metrics import LossReducer
from longred_megatron.training.optimizer import set_hyperparameters
from tests.layouts.sabotage import SABOTAGE
from tests.training.workspace import build_run


@dataclass(frozen=True)
class Case:
    """Some steps of a recipe in a layout.

    name: of the folder its outcome lies in. overrides: as on the command line. sabotage: a fault of `SABOTAGE` to
    make on purpose. resume: a checkpoint to start from. save: where to leave one, as it was loaded, or after the first
    step.
    """

    name: str
    world: int
    recipe: Path
    overrides: tuple[str, ...] = ()
    sabotage: str | None = None
    steps: range = range(1, 3)
    save: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """metrics: a step's losses and gradient norm, of each step; weights: Hugging Face tensors after the last."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor] = field(repr=False)

    def last(self, num_steps: int) -> "Outcome":
        """The same with the metrics of the last steps alone."""
        return Outcome(self.metrics[-num_steps:], self.weights)

    def difference(self, other: "Outcome") -> dict[str, float]:
        """The largest relative difference of any loss, of the gradient norm, and of any tensor (by its norm)."""
        assert [m.keys() for m in self.metrics] == [m.keys() for m in other.metrics]
        assert self.weights.keys() == other.weights.keys()
        pairs = [(n, a[n], b[n]) for a, b in zip(self.metrics, other.metrics, strict=True) for n in a]
        tensors = [(self.weights[n], t) for n, t in other.weights.items()]
        return {
            "losses": max(_relative(a, b) for n, a, b in pairs if n != "grad_norm"),
            "grad_norm": max(_relative(a, b) for n, a, b in pairs if n == "grad_norm"),
            "weights": max(float((a - b).norm() / b.norm()) for a, b in tensors),
        }


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def run_all(cases: Sequence[Case], folder: Path) -> Mapping[str, Outcome]:
    """Runs the cases; one set of processes for all those of a world size."""
    for world in sorted({case.world for case in cases}):
        run_ranks(_rank, world, [case for case in cases if case.world == world], folder)
    return {case.name: _outcome(folder / case.name) for case in cases}


def _outcome(folder: Path) -> Outcome:
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    return Outcome(metrics, weights)


def _rank(join: Callable[[str], None], cases: Sequence[Case], folder: Path) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for case in cases:
        output = folder / case.name
        output.mkdir(exist_ok=True)
        join(case.name)
        forget_models()
        with SABOTAGE[case.sabotage]() if case.sabotage else nullcontext():
            _train(case, output)
        destroy()


def _train(case: Case, output: Path) -> None:
    recipe = load_recipe(case.recipe, case.overrides)
    groups = initialize(recipe.parallel, seed=1)
    run = build_run(case.recipe, groups, *case.overrides)
    description = {"architecture": asdict(run.student), "source_hf": str(recipe.model.hf), "dtype": "fp32"}
    if case.resume:
        distributed.load(case.resume, run.chunks, run.optimizer)
        if case.save:
            distributed.save(case.save, run.chunks, description, run.optimizer)
    metrics: list[dict[str, Any]] = []
    reduce_losses = LossReducer(recipe.objectives, groups)
    for step in case.steps:
        set_hyperparameters(run.optimizer, recipe.optimizer, step, recipe.training.steps)
        microbatches = run.data.step(step, groups.dp.rank(), groups.dp.size())
        result = run.train_step(microbatches)
        losses = reduce_losses(microbatches, result.terms)
        metrics.append(losses | {"grad_norm": result.grad_norm})
        if case.save or step == case.steps[-1]:
            run.train_step.finish()
        if case.save and not case.resume and step == case.steps[0]:
            distributed.save(case.save, run.chunks, description, run.optimizer)
    if torch.distributed.get_rank() == 0:
        (output / "metrics.json").write_text(json.dumps(metrics))
    if groups.dp.rank() == 0 and groups.cp.rank() == 0:
        tensors = {
            name: tensor.clone()
            for part in huggingface.full_tensors(run.chunks, run.student, groups)
            for name, tensor in part.items()
        }
        if groups.tp.rank() == 0:
            save_file(tensors, output / f"stage-{groups.pp.rank()}.safetensors")
