"""The tensors of a checkpoint in torch_dist files. Nothing in them can run code: there are tensors, and an index.

torch writes the index, `.metadata`, as a pickle. A pickle may call what it names, so only the classes that an index is
made of are let in, by their exact names. What is no tensor would be a pickle too: none are written, none are read.
"""

import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from longred_megatron.device import on_gpu

INDEX = ".metadata"
# What a full disk, no permission or a damaged file ends in. torch's own is no Exception.
FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    AssertionError,
    CheckpointException,
    CheckpointingException,
)
_DTYPES = ("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool")
_ALLOWED = {
    *(("torch", name) for name in ("Size", *_DTYPES)),
    ("torch.serialization", "_get_layout"),  # a layout by its name
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}  # fmt: skip
# Checkpoints of earlier versions have this file, and hold what is no tensor as Megatron writes it: pickled [values].
_OF_EARLIER = "metadata.json"
_EARLIER_VALUES = MetadataIndex("common_state/shard_0_1")
_EARLIER_EMPTY = "._extra_state/"


class Writing:
    """The tensors of a sharded state on their way into the files of a folder. Every rank makes one and calls `write`;
    rank 0 then calls `finish`.

    Written by this process: Megatron's own strategy hands the files to helper processes even when it waits for them.
    Those take five seconds to start, and outlive a run that is killed.

    Args:
        group: the ranks that hold the same weights; each writes a share.
        copied: whether `write` writes the tensors as they are now, whatever becomes of them: they are copied.

    Attributes:
        values: what is left of `state` without its tensors.
    """

    def __init__(self, folder: Path, state: dict[str, Any], group: ProcessGroup, copied: bool) -> None:
        tensors, self.values = save_preprocess(_without_objects(state))
        distribution = determine_main_replica_uniform_distribution(tensors, group)
        distribute_main_replicas_with_precomputed_distribution(tensors, group, distribution)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        # Copying ahead from a GPU would use the stream, and the device, of whichever thread writes.
        self._writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0) if copied else dcp.FileSystemWriter(folder)
        self._index: Metadata | None = None

        def own_plan() -> SavePlan:
            if copied:
                _copy_to_host(tensor for parts in named.values() for tensor in parts)
            self._planner.set_up_planner(
                mcore_to_pyt_state_dict(named, False), is_coordinator=all_ranks().is_coordinator
            )
            self._writer.set_up_storage_writer(all_ranks().is_coordinator)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def all_plans(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._index = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        self._plan: SavePlan = all_ranks().reduce_scatter("plan", own_plan, all_plans)

    def write(self) -> list[WriteResult]:
        """Writes this rank's files and says where in them what is. No messages: it may run in a thread."""
        return self._writer.write_data(self._planner.finish_plan(self._plan), self._planner).value()

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Writes the index. results: of all ranks."""
        assert self._index is not None, "rank 0 has it"
        self._writer.finish(self._index, results)


def all_ranks() -> _DistWrapper:
    """torch's collectives over the world in which an exception of one rank becomes a CheckpointException of all."""
    return _DistWrapper(None, True, 0)


def read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Reads the tensors of a sharded state into place. Returns `state` with tensors where it had sharded ones.

    Raises:
        pickle.UnpicklingError: the index names something else than the parts of an index.
        FAILURES: damaged, or without a tensor of `state`.
    """
    index = read_index(folder)
    tensors, rest, factories = load_preprocess(_without_objects(state))
    tensors, _ = extract_matching_values(tensors, lambda value: isinstance(value, ShardedTensor))
    sharded = list(nested_values(tensors))
    named, flat, renamed = _replace_state_dict_keys_with_sharded_keys(tensors)
    found = mcore_to_pyt_state_dict(named, True)
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[each for each in sharded if not each.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={each.key: each for each in sharded if each.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    dcp.load(found, storage_reader=_Reader(folder, index), planner=planner, no_dist=True)
    loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in found.items()}
    loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
    _restore_dict_types(loaded, tensors)
    merge(rest, loaded)
    return apply_factory_merges(rest, factories)


def read_earlier_values(folder: Path) -> dict[str, Any]:
    """What a checkpoint of an earlier version holds beside its tensors: numbers and texts, which need no code."""
    place = read_index(folder).storage_data[_EARLIER_VALUES]
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        [values] = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    return values


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in `folder`.

    Raises:
        pickle.UnpicklingError: it names something else than the parts of an index, or has entries that are no tensors.
        FAILURES: not an index, or damaged.
    """
    try:
        index = _IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
        foreign = [*_foreign_entries(index, is_earlier=(folder / _OF_EARLIER).is_file())]
    except pickle.UnpicklingError:
        raise
    except OSError:
        raise
    except Exception as error:  # of damaged bytes; there is no end to their kinds
        raise pickle.UnpicklingError(f"damaged: {error!r}") from None
    if foreign:
        raise pickle.UnpicklingError(f"entries that are no tensors, or not of this folder: {', '.join(foreign[:5])}")
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader with the index that was checked; torch itself would unpickle the file again, whatever it names."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def _foreign_entries(index: Metadata, is_earlier: bool) -> Iterator[str]:
    for key, entry in index.state_dict_metadata.items():
        is_known = isinstance(entry, BytesStorageMetadata) and (key == _EARLIER_VALUES.fqn or _EARLIER_EMPTY in key)
        if not isinstance(entry, TensorStorageMetadata) and not (is_earlier and is_known):
            yield str(key)
    for place in index.storage_data.values():
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            yield repr(place.relative_path)


def _copy_to_host(tensors: Iterable[ShardedTensor]) -> None:
    """Replaces the data of each by a copy in this machine's memory, of a GPU's in pinned memory."""
    for tensor in tensors:
        copy = torch.empty_like(tensor.data, device="cpu", pin_memory=on_gpu())
        tensor.data = copy.copy_(tensor.data, non_blocking=True)
    if on_gpu():
        torch.cuda.current_stream().synchronize()


def _without_objects(state: dict[str, Any]) -> dict[str, Any]:
    """Without what modules keep beside tensors (`_extra_state`): pickles, and of these modules empty."""
    return extract_matching_values(state, lambda value: not isinstance(value, ShardedObject))[0]
