"""Megatron distributed checkpoints: saved in one layout, loaded in any.

A checkpoint is a folder: Megatron's torch_dist files, `checkpoint.json` (what it is) and, from training, `recipe.yaml`.
It is written under a name of its own and renamed when complete, so a folder without the suffix `.partial` is whole.
"""

import json
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from longred_megatron.checkpoint import optimizer_state
from longred_megatron.errors import UserError
from longred_megatron.files import PARTIAL, begin_folder, finish_folder, reason, remove_unfinished, write_text
from longred_megatron.model.chunk import ModelChunk

# What a torch_dist index is made of. It is a pickle, which may call any function it names: only these are let in.
_INDEX_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_INDEX_NAMES = {
    "torch": {
        "Size",
        "device",
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "int32",
        "int64",
        "uint8",
        "bool",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "builtins": {"set", "frozenset", "slice"},
}
# What a full disk, no permission or a damaged file ends in. torch's own is no Exception.
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    CheckpointException,
    dist_checkpointing.core.CheckpointingException,
)


def save(
    path: Path,
    chunks: Sequence[ModelChunk],
    description: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Writes the chunks' weights, and the optimizer's state if given, as the folder `path`. Every rank calls it.

    Args:
        description: stored as checkpoint.json; see `read_description`.
        add: puts more files into the folder it is given; rank 0 calls it before the checkpoint is whole.

    Raises:
        UserError: the folder cannot be written (a full disk, no permission); older checkpoints are untouched.
    """
    rank, partial = torch.distributed.get_rank(), path.with_name(path.name + PARTIAL)
    try:
        if rank == 0:
            begin_folder(path)
        torch.distributed.barrier()  # the world: nobody writes before the folder is there
        state = _sharded_state(chunks, optimizer)
        dist_checkpointing.save(state, str(partial), _SaveInProcess())
        marks = _marks_of_all_ranks(partial)
        if rank == 0:
            write_text(partial / "checkpoint.json", json.dumps(description | {"files": marks}, indent=1))
            if add is not None:
                add(partial)
            finish_folder(path)
    except _FAILURES as error:
        remove_unfinished(partial)
        raise UserError(
            f"{path}: the checkpoint could not be written ({_causes(error)}); older checkpoints are as they were"
        ) from error
    torch.distributed.barrier()  # the world: nobody goes on before the checkpoint is whole


def check(path: Path) -> None:
    """Raises UserError, the same on every rank, unless every file of the checkpoint is as it was written.

    Every rank calls it and reads its share of the files.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = None
    try:
        marks = read_description(path)["files"]
        own = [(path / name, mark) for name, mark in sorted(marks.items())[rank::size]]
        changed = [file.name for file, mark in own if not file.is_file() or _mark(file) != mark]
        if changed:
            problem = f"{path}: {', '.join(changed)} is not as it was written; the checkpoint is damaged"
    except UserError as error:
        problem = str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path}: not a whole checkpoint ({error!r})"
    problems: list[str | None] = [None] * size
    torch.distributed.all_gather_object(problems, problem)  # the world: all ranks go on, or none
    if found := [text for text in problems if text]:
        raise UserError(*dict.fromkeys(found))


def load(path: Path, chunks: Sequence[ModelChunk], optimizer: MegatronOptimizer | None = None) -> None:
    """Reads the weights, and the optimizer's state if asked for, into this layout. Every rank calls it.

    Raises:
        UserError: not a checkpoint, damaged, or of another model.
    """
    read_description(path)
    _refuse_foreign_pickles(path / ".metadata")
    state = _sharded_state(chunks, optimizer)
    try:
        loaded = dist_checkpointing.load(state, str(path))
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        if optimizer is not None:
            optimizer_state.load(optimizer, loaded["optimizer"])
    except _FAILURES as error:
        raise UserError(f"{path}: the checkpoint cannot be loaded ({_causes(error)})") from error


def _marks_of_all_ranks(folder: Path) -> dict[str, str]:
    """Marks of all files in `folder`: each rank reads those it has just written, rank 0 the others too."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = [path.name for path in folder.iterdir()]
    ours = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]
    parts: list[dict[str, str]] = [{} for _ in range(size)]
    torch.distributed.all_gather_object(parts, {name: _mark(folder / name) for name in ours})  # the world
    return {name: mark for part in parts for name, mark in part.items()}


def _mark(path: Path) -> str:
    """Size and CRC-32 of a file: enough against accidents, and faster than disks."""
    total, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total, crc = total + len(block), zlib.crc32(block, crc)
    return f"{total}-{crc:08x}"


def read_description(path: Path) -> dict[str, Any]:
    """checkpoint.json: `architecture` (fields of Architecture, RoPE and window as trained), `source_hf` (folder),
    `dtype` ("bf16", "fp16" or "fp32"), `files` (see `check`); from training also `step`."""
    try:
        return json.loads((path / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of this project (checkpoint.json: {error})") from None


def _sharded_state(chunks: Sequence[ModelChunk], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {f"model{i}": s.sharded_state_dict() for i, s in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded_state(optimizer, state)
    return state


def _causes(error: BaseException) -> str:
    """What went wrong on each rank, without the traces torch collects."""
    if not isinstance(error, CheckpointException):
        return reason(error)
    return "; ".join(f"rank {rank}: {reason(failure)}" for rank, (failure, _) in error.failures.items())


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """The same files, written by this process.

    Megatron's own strategy hands them to helper processes even when it waits for them. Those take five seconds to
    start, and outlive a run that is killed.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _INDEX_MODULES or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _refuse_foreign_pickles(index: Path) -> None:
    try:
        with index.open("rb") as file:
            _IndexUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise UserError(f"{index}: not the index of a distributed checkpoint ({error})") from None
