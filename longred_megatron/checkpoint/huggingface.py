"""Weights from a Hugging Face folder into the model chunks of any layout, and from any layout into a folder."""

import errno
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from longred_megatron.checkpoint.hf_config import (
    CONFIG,
    RECORD,
    copy_companions,
    exported_config,
    widen_companions,
    write_json,
)
from longred_megatron.checkpoint.weight_files import INDEX, SINGLE, WeightFiles
from longred_megatron.checkpoint.weight_map import chunk_rules
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.families.weights import Rule
from longred_megatron.files import (
    PARTIAL,
    begin_folder,
    finish_folder,
    read_json,
    reason,
    removed_on_failure,
    save_tensors,
    write_text,
)
from longred_megatron.model.chunk import ModelChunk

MAX_SHARD_BYTES = 5 * 10**9  # transformers' own limit: "5GB"
Shard = tuple[str, dict[str, int]]  # file name, {tensor name: bytes}


@dataclass(frozen=True)
class Record:
    """Which training checkpoint an export was made of: its step, and its digest (`distributed.Description`)."""

    step: int
    checkpoint: str


def read_record(hf: Path) -> Record | None:
    """The record of an exported folder; None where there is none, or where a weight file is not as large as it says."""
    try:
        values = read_json(hf / RECORD)
        is_whole = all((hf / file).stat().st_size == size for file, size in values.pop("bytes").items())
        return Record(**values) if is_whole else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def load_weights(
    chunks: Sequence[ModelChunk], hf: Path, architecture: Architecture, groups: ProcessGroupCollection
) -> None:
    """Reads this rank's part of the weights in `hf`, tensor by tensor, into the parameters and their dtype.

    No communication: every rank opens the files and reads only the slices it holds.

    Raises:
        UserError: missing, broken or pickled files; tensors that are missing, unexpected or of another shape.
    """
    with WeightFiles(hf) as files:
        files.check(architecture)
        for parameter, rule in _progress(_parameters(chunks, architecture), "reading weights"):
            shard = _read(files, rule, groups)
            if architecture.tied_embeddings and architecture.embedding_name in rule.huggingface:
                _check_tied_head(files, rule, shard, architecture, groups)
            parameter.data.copy_(shard)


def export(
    chunks: Sequence[ModelChunk],
    source_hf: Path,
    output: Path,
    architecture: Architecture,
    groups: ProcessGroupCollection,
    *,
    rope: Mapping[str, Any],
    max_position_embeddings: int,
    dtype: torch.dtype | None = None,
    recipe_text: str | None = None,
    record: Record | None = None,
) -> None:
    """Writes a folder that transformers loads: weights, config.json, the source's tokenizer and other files.

    Every rank calls it. Tensor ranks 0 of the first replica write the shards of their own pipeline stage,
    holding one shard (`MAX_SHARD_BYTES`) in memory; no weight travels between stages. The folder appears at
    the end, whole.

    Args:
        source_hf: where the model came from: settings, tokenizer, and the weights' dtypes if `dtype` is None.
        output: must not exist, or be empty. Shared by all ranks.
        rope: transformers' `rope_parameters` of the exported model.
        max_position_embeddings: its window in tokens.
        dtype: of the written tensors; None: each as in the source.
        recipe_text: written as recipe.yaml.
        record: written beside the model, see `read_record`.

    Raises:
        UserError: on every rank; `output` is in use or cannot be written, or the source lacks a file.
    """
    source_hf, output = Path(source_hf), Path(output).absolute()
    temporary = output.with_name(output.name + PARTIAL)
    is_first_rank = torch.distributed.get_rank() == 0
    shards: list[Shard] = []
    with removed_on_failure(output) if is_first_rank else nullcontext():
        with _failing_together(output):
            dtypes = _target_dtypes(source_hf, dtype)
            raw_config = read_json(source_hf / CONFIG)
            if is_first_rank:
                check_free(output)
                begin_folder(output)
        with _failing_together(output):
            if groups.dp.rank() == 0 and groups.cp.rank() == 0:
                shards = _write_chunks(chunks, architecture, groups, temporary, dtypes)
        all_shards: list[list[Shard]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(all_shards, shards)  # the world: names for the index
        with _failing_together(output):
            if is_first_rank:
                _name_shards(temporary, [shard for rank_shards in all_shards for shard in rank_shards])
                config = exported_config(raw_config, dict(rope), max_position_embeddings, _main_dtype(dtypes))
                _write_companions(temporary, source_hf, raw_config, config, recipe_text, record)
                finish_folder(output)


def full_tensors(
    chunks: Sequence[ModelChunk], architecture: Architecture, groups: ProcessGroupCollection
) -> Iterator[dict[str, Tensor]]:
    """The Hugging Face tensors of this rank's pipeline stage, one parameter's at a time, on the CPU.

    All tensor ranks must iterate; ranks other than 0 receive empty mappings.
    """
    for parameter, rule in _progress(_parameters(chunks, architecture), "writing weights"):
        shard, size = parameter.detach(), groups.tp.size()
        on_first = groups.tp.rank() == 0
        shards = [torch.empty_like(shard) for _ in range(size)] if on_first else None
        # The tensor group: its ranks hold the parts of one parameter, and its rank 0 writes.
        torch.distributed.gather(shard.contiguous(), shards, group=groups.tp, group_dst=0)
        tensors = rule.to_huggingface([part.cpu() for part in shards]) if shards is not None else {}
        del shards  # from the device, before the next parameter's are made
        yield tensors


def check_free(output: Path) -> None:
    """Raises UserError if `output` is a file or a folder with something in it."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another output folder or remove this one")


def _parameters(chunks: Sequence[ModelChunk], architecture: Architecture) -> list[tuple[Tensor, Rule]]:
    return [
        (chunk.get_parameter(name), rule) for chunk in chunks for name, rule in chunk_rules(chunk, architecture).items()
    ]


def _progress(items: list[tuple[Tensor, Rule]], title: str) -> Iterator[tuple[Tensor, Rule]]:
    hidden = None if torch.distributed.get_rank() == 0 else True  # None: hidden unless a terminal
    return iter(tqdm(items, desc=title, unit=" parameters", disable=hidden))


def _read(files: WeightFiles, rule: Rule, groups: ProcessGroupCollection) -> Tensor:
    return rule.to_megatron([files[name] for name in rule.huggingface], groups.tp.rank(), groups.tp.size())


def _check_tied_head(
    files: WeightFiles, rule: Rule, embedding: Tensor, architecture: Architecture, groups: ProcessGroupCollection
) -> None:
    name = architecture.head_name
    if name not in files:
        return
    head = rule.to_megatron([files[name]], groups.tp.rank(), groups.tp.size())
    if not torch.equal(head, embedding):
        raise UserError(
            f"{files.hf}: config.json ties the embeddings, but {name} differs from {architecture.embedding_name}; "
            "set tie_word_embeddings to false if the head is its own"
        )


def _target_dtypes(source_hf: Path, dtype: torch.dtype | None) -> dict[str, torch.dtype] | torch.dtype:
    if dtype is not None:
        return dtype
    with WeightFiles(source_hf) as files:
        return files.dtypes()


def _main_dtype(dtypes: dict[str, torch.dtype] | torch.dtype) -> torch.dtype:
    """What config.json names: the dtype of most tensors."""
    return dtypes if isinstance(dtypes, torch.dtype) else Counter(dtypes.values()).most_common(1)[0][0]


def _write_chunks(
    chunks: Sequence[ModelChunk],
    architecture: Architecture,
    groups: ProcessGroupCollection,
    folder: Path,
    dtypes: dict[str, torch.dtype] | torch.dtype,
) -> list[Shard]:
    """Writes this pipeline stage's tensors; returns its files, on tensor rank 0 (nothing on others)."""
    writer = _ShardWriter(folder, f"stage-{groups.pp.rank():05d}")
    owns_embedding = any(chunk.pre_process for chunk in chunks)
    for tensors in full_tensors(chunks, architecture, groups):
        for name, tensor in tensors.items():
            if name == architecture.embedding_name and not owns_embedding:
                continue  # the last stage's copy of a tied embedding
            writer.add(name, tensor.to(dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]))
    return writer.finish()


class _ShardWriter:
    """Collects tensors and writes a file when the next would not fit.

    A failure to write is kept until `finish`: the other tensor ranks wait in the gathers still to come.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.shards: list[Shard] = []
        self._tensors: dict[str, Tensor] = {}
        self._failure: OSError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        if sum(t.nbytes for t in self._tensors.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self._tensors[name] = tensor

    def finish(self) -> list[Shard]:
        self._flush()
        if self._failure is not None:
            raise self._failure
        return self.shards

    def _flush(self) -> None:
        if self._tensors and self._failure is None:
            file = f"{self.prefix}-{len(self.shards):05d}.safetensors"
            try:
                save_tensors(self._tensors, self.folder / file, {"format": "pt"})
            except OSError as error:
                self._failure = error
            self.shards.append((file, {name: tensor.nbytes for name, tensor in self._tensors.items()}))
        self._tensors = {}


def _name_shards(folder: Path, shards: list[Shard]) -> None:
    """Gives the files transformers' names, and an index if there are several."""
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, (file, tensors) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / file).rename(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensors.values())
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_companions(
    folder: Path,
    source_hf: Path,
    old_config: dict[str, Any],
    config: dict[str, Any],
    recipe_text: str | None,
    record: Record | None,
) -> None:
    """Writes what is beside the weights in `folder`."""
    write_json(folder / CONFIG, config)
    sizes = {}
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable by the owner only
        shutil.copymode(folder / CONFIG, file)
        sizes[file.name] = file.stat().st_size
    copy_companions(source_hf, folder)
    widen_companions(folder, old_config.get("max_position_embeddings", 0), config["max_position_embeddings"])
    if recipe_text is not None:
        write_text(folder / "recipe.yaml", recipe_text)
    if record is not None:
        write_json(folder / RECORD, asdict(record) | {"bytes": sizes})


@contextmanager
def _failing_together(output: Path) -> Iterator[None]:
    """A failure on one rank becomes a UserError on all, so that none waits."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = _sentence(error, output)
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)  # the world: all ranks are in the export
    found = [text for text in problems if text]
    if found:
        raise UserError(*dict.fromkeys(found))


def _sentence(error: OSError, output: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"{output}: the disk is full; nothing was written; free space or choose another output folder"
    where = error.filename or output
    return f"{where}: the model could not be written ({reason(error)}); nothing was written"
