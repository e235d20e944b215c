"""Megatron distributed checkpoints: saved in one layout, loaded in any.

A checkpoint is a folder: Megatron's torch_dist files, `checkpoint.json` (what it is) and, from training, `recipe.yaml`.
It is written under a name of its own and renamed when complete, so a folder without the suffix `.partial` is whole.
"""

import json
import pickle
import shutil
from collections.abc import Sequence
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

from longred_megatron.errors import UserError
from longred_megatron.model.stage import Stage

# The optimizer state as whole tensors, one per parameter: loads under any tensor, pipeline and data-parallel sizes.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
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
PARTIAL = ".partial"
# What a full disk, a missing right or a damaged file ends in. torch's own is no Exception.
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
    stages: Sequence[Stage],
    description: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    extra_files: dict[str, str] | None = None,
) -> None:
    """Writes the stages' weights, and the optimizer's state if given, as the folder `path`. Every rank calls it.

    Args:
        description: stored as checkpoint.json; see `read_description`.
        extra_files: {name: text} to store beside it.

    Raises:
        UserError: the folder cannot be written (a full disk, no permission); older checkpoints are untouched.
    """
    rank, partial = torch.distributed.get_rank(), path.with_name(path.name + PARTIAL)
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()  # the world: nobody writes before the folder is there
        state = _sharded_state(stages, optimizer, is_loading=False)
        dist_checkpointing.save(state, str(partial), _SaveInProcess())
        if rank == 0:
            files = {"checkpoint.json": json.dumps(description, indent=1)} | (extra_files or {})
            for name, text in files.items():
                (partial / name).write_text(text)
            partial.rename(path)
    except _FAILURES as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{path}: the checkpoint could not be written ({_causes(error)}); free space and start again"
        ) from error
    torch.distributed.barrier()  # the world: nobody goes on before the checkpoint is whole


def load(path: Path, stages: Sequence[Stage], optimizer: MegatronOptimizer | None = None) -> None:
    """Reads the weights, and the optimizer's state if asked for, into this layout. Every rank calls it.

    Raises:
        UserError: not a checkpoint, damaged, or of another model.
    """
    read_description(path)
    _refuse_foreign_pickles(path / ".metadata")
    state = _sharded_state(stages, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except _FAILURES as error:
        raise UserError(f"{path}: the checkpoint cannot be loaded ({_causes(error)})") from error
    for i, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{i}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def read_description(path: Path) -> dict[str, Any]:
    """checkpoint.json: `architecture` (fields of Architecture, RoPE and window as trained), `source_hf` (folder),
    `dtype` ("bf16", "fp16" or "fp32"); from training also `step`."""
    try:
        return json.loads((path / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of this project (checkpoint.json: {error})") from None


def _sharded_state(stages: Sequence[Stage], optimizer: MegatronOptimizer | None, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {f"model{i}": s.sharded_state_dict() for i, s in enumerate(stages)}
    if optimizer is not None:
        model = state["model0"] if len(stages) == 1 else dict(state.items())
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    return state


def _causes(error: BaseException) -> str:
    """What went wrong on each rank, without the traces torch collects."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())


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
