"""Whole checkpoints between Hugging Face folders and Megatron's distributed format, in one process."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.checkpoint import distributed
from longred_megatron.checkpoint.hf_config import CONFIG, copy_companions
from longred_megatron.checkpoint.huggingface import Record, check_free, export, load_weights
from longred_megatron.checkpoint.verification import Verification, verify
from longred_megatron.checkpoint.weight_files import INDEX, SINGLE, WeightFiles
from longred_megatron.dtypes import DTYPES
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture, read_architecture
from longred_megatron.files import try_output, without_new_parents
from longred_megatron.layout import Parallel
from longred_megatron.model.chunk import ModelChunk, build_chunks
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.precision import Precision
from longred_megatron.recipe import load_recipe

HF_SOURCE = "hf_source"  # in a converted checkpoint: the source's config.json, tokenizer and other small files
RECIPE = "recipe.yaml"


def hf_to_megatron(hf: Path, output: Path) -> None:
    """Writes the weights in `hf` as a distributed checkpoint that any layout can load.

    Raises:
        UserError: `hf` is not a supported model, or `output` is in use or cannot be written.
    """
    hf, output = hf.absolute(), output.absolute()
    check_free(output)
    try_output(output, "--output")
    architecture = read_architecture(hf)
    with WeightFiles(hf) as files:
        dtype = _dtype_holding(files)
    with without_new_parents(output), _one_process() as groups:
        chunks = _build(architecture, dtype, groups)
        load_weights(chunks, hf, architecture, groups)
        description = {"architecture": asdict(architecture), "source_hf": str(hf), "dtype": dtype}

        def add_source(folder: Path) -> None:
            (folder / HF_SOURCE).mkdir()
            shutil.copyfile(hf / CONFIG, folder / HF_SOURCE / CONFIG)
            copy_companions(hf, folder / HF_SOURCE)

        distributed.save(output, chunks, description, add=add_source)


def megatron_to_hf(checkpoint: Path, output: Path) -> None:
    """Exports a converted or a training checkpoint, with the RoPE and window it was trained with.

    Settings and tokenizer come from the folder the model was made from or, where that is gone, from the copy
    in a converted checkpoint. A training checkpoint's recipe is exported too.

    Raises:
        UserError: not a checkpoint, its source is gone, or `output` is in use or cannot be written.
    """
    check_free(output)
    try_output(output, "--output")
    description = distributed.read_description(checkpoint)
    architecture = description.architecture
    source, dtype = _source(checkpoint, description, architecture)
    recipe = checkpoint / RECIPE
    with without_new_parents(output), _one_process() as groups:
        chunks = _build(architecture, description.dtype, groups)
        distributed.check(checkpoint)
        distributed.load(checkpoint, chunks)
        export(
            chunks,
            source,
            output,
            architecture,
            groups,
            rope=architecture.rope,
            max_position_embeddings=architecture.max_position_embeddings,
            dtype=dtype,
            recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
            record=Record(description.step, description.digest) if description.step is not None else None,
        )


def verify_checkpoint(hf: Path, checkpoint: Path) -> Verification:
    """Compares a checkpoint with a Hugging Face folder; see `verify`."""
    description = distributed.read_description(checkpoint)
    architecture = description.architecture
    with _one_process() as groups:
        chunks = _build(architecture, description.dtype, groups)
        distributed.check(checkpoint)
        distributed.load(checkpoint, chunks)
        return verify(chunks, hf, architecture, groups)


@contextmanager
def _one_process() -> Iterator[ProcessGroupCollection]:
    try:
        yield initialize(Parallel(), seed=0, alone=True)  # no random number is drawn
    finally:
        destroy()


def _build(architecture: Architecture, dtype: str, groups: ProcessGroupCollection) -> list[ModelChunk]:
    """Stages in a dtype that holds every value of `dtype`."""
    params: Any = "bf16" if dtype == "bf16" else "fp32"
    return build_chunks(architecture, Parallel(), Precision(params=params), groups)


def _dtype_holding(files: WeightFiles) -> str:
    """The name of the dtype that holds every tensor exactly: theirs, or fp32 where they differ."""
    found = set(files.dtypes().values())
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), "fp32")


def _source(
    checkpoint: Path, description: distributed.Description, architecture: Architecture
) -> tuple[Path, torch.dtype | None]:
    """The folder to take settings from, and the dtype to write (None: each tensor's own there)."""
    window: dict[str, Any] = {
        "rope": architecture.rope,
        "max_position_embeddings": architecture.max_position_embeddings,
    }
    candidates = [description.source_hf, checkpoint / HF_SOURCE, *_after_a_move(checkpoint, description.source_hf)]
    for hf in candidates:
        if (hf / CONFIG).is_file() and replace(read_architecture(hf), **window) == architecture:
            return hf, _dtype(hf, description.dtype)
    raise UserError(
        f"{checkpoint}: the model it was made from is in neither {candidates[0]} nor {checkpoint / HF_SOURCE}; "
        f"put its config.json and tokenizer into one of them"
    )


def _after_a_move(checkpoint: Path, source_hf: Path) -> Iterator[Path]:
    """Where the source lies if it was moved together with the run folder of a training checkpoint."""
    with suppress(UserError):
        old_run = load_recipe(checkpoint / RECIPE).run.dir
        yield Path(os.path.normpath(checkpoint.absolute().parent.parent / os.path.relpath(source_hf, old_run)))


def _dtype(hf: Path, held: str) -> torch.dtype | None:
    """None where `hf` has weights and the checkpoint's dtype holds them exactly."""
    if not any((hf / file).is_file() for file in (SINGLE, INDEX)):
        return DTYPES[held]
    with WeightFiles(hf) as files:
        return None if _dtype_holding(files) == held else DTYPES[held]
