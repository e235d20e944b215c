"""Megatron distributed checkpoints: saved in one layout, loaded in any.

A checkpoint is a folder: Megatron's torch_dist files, `checkpoint.json` (what it is) and, from training, `recipe.yaml`.
It is written under a name of its own and renamed when complete, so a folder without the suffix `.partial` is whole.
"""

import hashlib
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.optimizer import MegatronOptimizer
from pydantic import TypeAdapter, ValidationError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from longred_megatron.checkpoint import optimizer_state, tensor_files
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.files import (
    PARTIAL,
    begin_folder,
    finish_folder,
    reason,
    remove_unfinished,
    removed_on_failure,
    write_text,
)
from longred_megatron.model.chunk import ModelChunk
from longred_megatron.model.fp8 import sharded_scales
from longred_megatron.rope.frequencies import frequency_problem

DESCRIPTION = "checkpoint.json"


@dataclass(frozen=True)
class Description:
    """What checkpoint.json says of a checkpoint.

    architecture: with RoPE and window as trained. source_hf: the folder it was made from. files: a mark for each, see
    `check`. step, optimizer: of a training; the optimizer's hyperparameters and step count. digest: of all the others.
    """

    architecture: Architecture
    source_hf: Path
    dtype: Literal["bf16", "fp16", "fp32"]
    files: dict[str, str]
    step: int | None = None
    optimizer: dict[str, Any] | None = None
    digest: str = ""


def save(
    path: Path,
    chunks: Sequence[ModelChunk],
    description: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Writes the chunks' weights, and the optimizer's state if given, as the folder `path`. Every rank calls it; nobody
    goes on before the checkpoint is whole. See `Saving`.
    """
    Saving(path, chunks, description, optimizer, add).finish()


class Saving:
    """A checkpoint on its way to the folder `path`. Every rank makes one and calls the same methods.

    Args:
        description: fields of `Description` that the caller knows.
        add: puts more files into the folder it is given; rank 0 calls it before the checkpoint is whole.
        in_background: a thread writes copies of the tensors while the caller changes them. Otherwise `finish` writes.

    Raises:
        UserError: the folder cannot be written (a full disk, no permission); older checkpoints are untouched. Also
            from `finish`, on every rank.
    """

    def __init__(
        self,
        path: Path,
        chunks: Sequence[ModelChunk],
        description: dict[str, Any],
        optimizer: MegatronOptimizer | None = None,
        add: Callable[[Path], None] | None = None,
        in_background: bool = False,
    ) -> None:
        self._path, self._partial, self._add = path, path.with_name(path.name + PARTIAL), add
        with _saving_failures(path):
            if torch.distributed.get_rank() == 0:
                begin_folder(path)
            torch.distributed.barrier()  # the world: nobody writes before the folder is there
            state, same_weights = _sharded_state(chunks, optimizer), chunks[0].pg_collection.dp_cp
            if optimizer is not None:
                state["fp8"] = sharded_scales(chunks)
            self._writing = tensor_files.Writing(self._partial, state, same_weights, copied=in_background)
        self._description = description | self._writing.values
        self._written: Future[_Written] | None = None
        if in_background:
            executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self._written = executor.submit(self._write)
            executor.shutdown(wait=False)

    def is_written(self) -> bool:
        """Whether the threads of all ranks have ended, well or not; the same answer on every rank."""
        assert self._written is not None
        ended = torch.tensor([self._written.done()], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(ended, torch.distributed.ReduceOp.MIN)  # the world: all ranks finish, or none
        return bool(ended)

    def finish(self) -> None:
        """Waits for all ranks and gives the folder its name."""
        with _saving_failures(self._path):
            written = self._written.result if self._written else self._write
            tensor_files.all_ranks().all_reduce("write", written, self._make_whole)

    def abandon(self) -> None:
        """Removes what has been written: the run has failed."""
        remove_unfinished(self._partial)

    def _write(self) -> "_Written":
        """This rank's files, and a mark of each."""
        results = self._writing.write()
        own = self._partial.glob(f"__{torch.distributed.get_rank()}_*")
        return results, {file.name: _mark(file) for file in own}

    def _make_whole(self, parts: "list[_Written]") -> None:
        """On rank 0, with what all ranks have written."""
        self._writing.finish([results for results, _ in parts])
        marks = {name: mark for _, own in parts for name, mark in own.items()}
        marks[tensor_files.INDEX] = _mark(self._partial / tensor_files.INDEX)
        whole = self._description | {"files": marks}
        write_text(self._partial / DESCRIPTION, json.dumps(whole | {"digest": _digest(whole)}, indent=1))
        if self._add is not None:
            self._add(self._partial)
        finish_folder(self._path)


_Written = tuple[list[WriteResult], dict[str, str]]  # see `Writing.write`; and marks by the names of files


@contextmanager
def _saving_failures(path: Path) -> Iterator[None]:
    with removed_on_failure(path):
        try:
            yield
        except tensor_files.FAILURES as error:
            raise UserError(
                f"{path}: the checkpoint could not be written ({_causes(error)}); older checkpoints are as they were: "
                "free space and start again"
            ) from error


def check(path: Path) -> None:
    """Raises UserError, the same on every rank, unless the checkpoint is as it was written, and at its place.

    Every rank calls it and reads its share of the files.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = None
    try:
        marks = read_description(path).files
        own = [(path / name, mark) for name, mark in sorted(marks.items())[rank::size]]
        changed = [file.name for file, mark in own if not file.is_file() or _mark(file) != mark]
        if changed:
            problem = f"{path}: {', '.join(changed)} is not as it was written; the checkpoint is damaged"
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{path}: not a whole checkpoint ({reason(error)})"
    problems: list[str | None] = [None] * size
    torch.distributed.all_gather_object(problems, problem)  # the world: all ranks go on, or none
    if found := [text for text in problems if text]:
        raise UserError(*dict.fromkeys(found))


def load(path: Path, chunks: Sequence[ModelChunk], optimizer: MegatronOptimizer | None = None) -> None:
    """Reads the weights, and the optimizer's state if asked for, into this layout. Every rank calls it.

    Raises:
        UserError: not a checkpoint, damaged, or of another model.
    """
    values = read_description(path).optimizer
    state = _sharded_state(chunks, optimizer)
    try:
        if optimizer is not None:  # a phase before may have trained without FP8; then the scales start here
            there = tensor_files.read_index(path).state_dict_metadata
            state["fp8"] = {key: scale for key, scale in sharded_scales(chunks).items() if key in there}
        loaded = tensor_files.read(path, state)
        for i, chunk in enumerate(chunks):
            lost = [n for n in chunk.load_state_dict(loaded[f"model{i}"], strict=False).missing_keys if _is_tensor(n)]
            if lost:
                raise KeyError(f"without {', '.join(lost[:5])}")
        if optimizer is not None:
            optimizer_state.load(optimizer, values or tensor_files.read_earlier_values(path)["optimizer"])
    except (*tensor_files.FAILURES, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the checkpoint cannot be loaded ({_causes(error)})") from error


def _is_tensor(name: str) -> bool:
    return not name.endswith("_extra_state")


def _mark(path: Path) -> str:
    """Size and CRC-32 of a file: enough against accidents, and faster than disks."""
    total, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total, crc = total + len(block), zlib.crc32(block, crc)
    return f"{total}-{crc:08x}"


def read_description(path: Path) -> Description:
    """Raises UserError unless `path` is a checkpoint whose checkpoint.json is as it was written, and at its place."""
    try:
        text = (path / DESCRIPTION).read_text(encoding="utf-8")
        raw = json.loads(text)
        described = TypeAdapter(Description).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{path}: not a checkpoint of this project ({DESCRIPTION}: {where}: {first['msg']})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this project ({DESCRIPTION}: {reason(error)})") from None
    if unknown := raw["architecture"].keys() - asdict(described.architecture).keys():
        raise UserError(
            f"{path}: {DESCRIPTION}: architecture.{min(unknown)} is not known; use the version that wrote it"
        )
    model = described.architecture
    for name, value in asdict(model).items():
        if type(value) is int and value < 1:
            raise UserError(f"{path}: {DESCRIPTION}: architecture.{name} is {value}, less than 1; it is damaged")
    if problem := frequency_problem(model.rope, model.head_dim, model.max_position_embeddings):
        raise UserError(f"{path}: {DESCRIPTION}: {problem}; it is damaged")
    digest = raw.pop("digest", None)  # earlier versions wrote none
    if digest not in (None, _digest(raw)):
        raise UserError(f"{path}: {DESCRIPTION} is not as it was written; the checkpoint is damaged")
    if tensor_files.INDEX not in described.files or any(Path(name).name != name for name in described.files):
        raise UserError(f"{path}: {DESCRIPTION} does not list the files of the checkpoint; it is damaged")
    number = re.fullmatch(r"step-(\d+)", path.name)
    if number and described.step is not None and int(number[1]) != described.step:
        raise UserError(f"{path}: is the checkpoint of step {described.step}, renamed; give it its name back")
    return replace(described, digest=_digest(raw))


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


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
