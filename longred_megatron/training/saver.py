"""The checkpoints of a run: written while it waits, or beside the steps that follow (`training.async_save`)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
from megatron.core.optimizer import MegatronOptimizer

from longred_megatron.checkpoint import distributed
from longred_megatron.families import Architecture
from longred_megatron.files import write_text
from longred_megatron.model.chunk import ModelChunk
from longred_megatron.recipe import Recipe, dump_recipe
from longred_megatron.training import run_folder
from longred_megatron.training.watchdog import Watchdog


class CheckpointSaver:
    """Every rank has one and calls the same methods. One checkpoint at a time is on its way.

    Leaving it by an exception removes what has been written of that one.

    Raises: `UserError` from every method when the disk is full, on every rank.
    """

    def __init__(self, recipe: Recipe, watchdog: Watchdog) -> None:
        self._recipe, self._watchdog = recipe, watchdog
        self._step = 0
        self._pending: distributed.Saving | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._pending:
            self._pending.abandon()

    def save(
        self,
        step: int,
        chunks: Sequence[ModelChunk],
        architecture: Architecture,
        optimizer: MegatronOptimizer,
        is_last: bool = False,
    ) -> None:
        """Saves the state after `step`, unless there is a checkpoint of it.

        is_last: no step follows it that it could be written beside.
        """
        self.finish()
        self._step = step
        path = run_folder.checkpoint_path(self._recipe.run.dir, step)
        if not path.is_dir():
            self._watchdog.progress(f"the checkpoint of step {step}")
            description = {
                "architecture": asdict(architecture),
                "source_hf": str(self._recipe.model.hf),
                "dtype": self._recipe.precision.params,
                "step": step,
            }
            in_background = self._recipe.training.async_save and not is_last
            self._pending = distributed.Saving(
                path, chunks, description, optimizer, self._add_recipe, in_background=in_background
            )
            if not in_background:
                self.finish()

    def after_step(self) -> None:
        """Lets the checkpoint on its way appear, if all ranks have written it."""
        if self._pending and self._pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint on its way, if there is one; then removes the oldest ones."""
        if self._pending:
            self._watchdog.progress(f"the checkpoint of step {self._step}")
            pending, self._pending = self._pending, None
            pending.finish()
        if torch.distributed.get_rank() == 0:
            run_folder.prune_checkpoints(self._recipe.run.dir, self._recipe.training.keep_checkpoints)

    def _add_recipe(self, folder: Path) -> None:
        write_text(folder / run_folder.RECIPE, dump_recipe(self._recipe))
