"""This engine's training step as a side of comparisons."""

from pathlib import Path

from longred_megatron.bench.base import Facts, Side
from longred_megatron.bench.inputs import phase_of
from longred_megatron.parallel.groups import initialize
from longred_megatron.training.metrics import LossReducer
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.optimizer import set_hyperparameters
from longred_megatron.training.run import build


class EngineStep(Side):
    """The optimizer step of a recipe as a run builds it, again and again on the micro-batches of its first step."""

    def __init__(self, recipe: Path, *overrides: str) -> None:
        phase = phase_of(recipe, *overrides)
        groups = initialize(phase.recipe.parallel, phase.recipe.training.seed)
        self.run = build(phase, MicroBatchSource(phase), groups)
        set_hyperparameters(self.run.optimizer, phase.recipe.optimizer, 1, phase.recipe.training.steps)
        self._microbatches = self.run.data.step(1, groups.dp.rank(), groups.dp.size())
        self._reduce_losses = LossReducer(phase.recipe.objectives, groups)
        self._facts: Facts = {}

    def once(self) -> None:
        result = self.run.train_step(self._microbatches)
        losses = self._reduce_losses(self._microbatches, result.terms)
        self._facts = losses | {"grad_norm": result.grad_norm}

    def facts(self) -> Facts:
        return self._facts
