"""Checkpoints: saving and loading against the rate of the disk itself."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from longred_megatron.bench.base import Case, Comparison, Side, Sizes, formats
from longred_megatron.bench.engine import EngineStep
from longred_megatron.bench.inputs import phase_of, write_recipe
from longred_megatron.checkpoint import distributed

BLOCK_BYTES = 2**24
OPTIMIZER_BYTES = 12  # of a parameter in a checkpoint: an fp32 copy, of fp32 weights too, and two fp32 moments


class Checkpoint(Comparison):
    """A checkpoint of weights and optimizer saved and loaded, against as many bytes written with fsync and read."""

    name = "checkpoint"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        objective = {"microbatches": 1, "sequence_length": sizes.sequence_length}
        params = formats()[-1]
        recipe = write_recipe(folder, sizes, {"next_token": objective}, sizes.layers, params)
        of_parameter = phase_of(recipe).recipe.precision.number_bytes + OPTIMIZER_BYTES
        num_bytes = of_parameter * sum(file.stat().st_size for file in (folder / "student").glob("*.safetensors")) // 4
        setting = f"{num_bytes / 1e9:.2g} GB, {params}"
        for what, ours, plain in (("save", OurSave, PlainWrite), ("load", OurLoad, PlainRead)):
            yield Case(
                f"{what} {setting}",
                partial(ours, recipe, folder / f"ours-{what}"),
                partial(plain, num_bytes, folder / f"plain-{what}"),
                num_bytes / 1e9,
                "GB",
            )


class OurSave(EngineStep):
    """A step's checkpoint, as training writes it: whole when it has its name."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        super().__init__(recipe)
        super().once()  # Adam's moments are there from the first step on
        self._folder = folder

    def before(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def once(self) -> None:
        run = self.run
        description = {
            "architecture": asdict(run.student),
            "source_hf": str(run.phase.recipe.model.hf),
            "dtype": run.phase.recipe.precision.params,
            "step": 1,
        }
        distributed.save(self._folder, run.chunks, description, run.optimizer)


class OurLoad(OurSave):
    """The same checkpoint, checked as a resumed run does and loaded; no page of it is in memory."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        super().__init__(recipe, folder)
        super().before()
        super().once()

    def before(self) -> None:
        for file in self._folder.iterdir():
            _forget(file)

    def once(self) -> None:
        distributed.check(self._folder)
        distributed.load(self._folder, self.run.chunks, self.run.optimizer)


class PlainWrite(Side):
    """A file of random bytes, block by block, and fsync."""

    def __init__(self, num_bytes: int, path: Path) -> None:
        self._num_bytes, self._path = num_bytes, path
        self._block = torch.randint(256, (BLOCK_BYTES,), dtype=torch.uint8).numpy().data

    def before(self) -> None:
        self._path.unlink(missing_ok=True)

    def once(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            for start in range(0, self._num_bytes, BLOCK_BYTES):
                file.write(self._block[: self._num_bytes - start])
            os.fsync(file.fileno())


class PlainRead(PlainWrite):
    """Such a file read, block by block; no page of it is in memory."""

    def __init__(self, num_bytes: int, path: Path) -> None:
        super().__init__(num_bytes, path)
        super().once()

    def before(self) -> None:
        _forget(self._path)

    def once(self) -> None:
        with self._path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass


def _forget(path: Path) -> None:
    """Takes a file out of the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
