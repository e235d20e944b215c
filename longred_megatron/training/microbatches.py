"""The micro-batches of each optimizer step: tokens, labels and position ids of every objective.

All of it is a pure function of the recipe and the step's number.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from longred_megatron.data.packing import Pack, PackedSequences
from longred_megatron.data.sequences import IndexedSequences, SequenceSource
from longred_megatron.errors import UserError
from longred_megatron.files import appearing_whole
from longred_megatron.kernels import positions
from longred_megatron.recipe import Recipe
from longred_megatron.recipe.schema import PackedDistillation, ShortToLong
from longred_megatron.training.order import TOKEN_OBJECTIVES, microbatch_order, replica_indices

NO_LOSS = -100  # the label of a token whose next one no loss asks for


@dataclass(frozen=True)
class MicroBatch:
    """n sequences of s tokens that one objective trains on."""

    index: int  # within the step, over all replicas
    objective: str
    tokens: Tensor  # [n, s] int64
    labels: Tensor  # [n, s] int64: the next token; -100 where no loss asks for it
    student_positions: Tensor  # [n, s] int64
    teacher_positions: Tensor | None  # [n, s] int64; None where there is no teacher
    num_valid_tokens: int  # N_i of the step loss: the tokens that the loss is averaged over
    weight: float  # of the objective in the step loss
    context_parallel: int | None  # ranks that share a sequence; None: all of the context-parallel group
    documents: Sequence[Sequence[int]] | None = None  # their lengths in each sequence, where each sees only itself


class MicroBatchSource:
    """Micro-batches by step number; a resumed run needs no other state.

    Each objective walks through its data in an order of its own: sequence j of its i-th micro-batch in step t
    (from 1) is sample ((t - 1) * microbatches + i) * n + j of its `SequenceSource`, where
    n = tokens_per_microbatch / sequence_length. Steps are numbered over the whole run: an objective whose data and
    counts stay the same from one phase to the next goes on where it was. Where they change, it goes on where it would
    be had they been so from the first step.

    Raises: `UserError` with the problems of all data sets.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._settings = dict(recipe.objectives.items())
        self._places = _places({name: settings.microbatches for name, settings in self._settings.items()})
        self._sources: dict[str, SequenceSource[NDArray[np.int64]]] = {}
        self._packs: dict[str, SequenceSource[Pack]] = {}
        problems: list[str] = []
        for name, settings in self._settings.items():
            seed = stable_hash(recipe.training.seed, "order", name, settings.data)
            try:
                blend, length = recipe.data[settings.data], settings.sequence_length
                if isinstance(settings, PackedDistillation):
                    self._packs[name] = SequenceSource(PackedSequences, blend, length, seed)
                else:
                    self._sources[name] = SequenceSource(IndexedSequences, blend, length, seed)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*dict.fromkeys(problems))  # two objectives may use the same files

    def step(self, step: int, replica: int, num_replicas: int) -> list[MicroBatch]:
        """The micro-batches that `replica` of `num_replicas` trains in step `step` (from 1), in order."""
        indices = replica_indices(len(self._places), replica, num_replicas)
        return [self._build(step, index, *self._places[index]) for index in indices]

    def _build(self, step: int, index: int, objective: str, place: int) -> MicroBatch:
        settings = self._settings[objective]
        length = settings.sequence_length
        num_sequences = self._recipe.step.tokens_per_microbatch // length
        first = ((step - 1) * settings.microbatches + place) * num_sequences
        samples = range(first, first + num_sequences)
        if isinstance(settings, PackedDistillation):
            return self._build_packed(index, settings, [self._packs[objective][sample] for sample in samples])
        texts = torch.from_numpy(np.stack([self._sources[objective][sample] for sample in samples]))  # [n, s + 1]
        tokens = texts[:, :-1].clone()  # not a view: labels and tokens may be moved and saved apart
        kind = settings.positions if isinstance(settings, ShortToLong) else "natural"
        generator = torch.Generator().manual_seed(
            stable_hash(self._recipe.training.seed, "positions", objective, step, place)
        )
        return MicroBatch(
            index=index,
            objective=objective,
            tokens=tokens,
            labels=texts[:, 1:].clone() if objective in TOKEN_OBJECTIVES else torch.full_like(tokens, NO_LOSS),
            student_positions=positions.draw(
                kind, num_sequences, length, self._recipe.model.max_position_embeddings, generator
            ),
            teacher_positions=positions.natural(num_sequences, length) if settings.needs_teacher else None,
            num_valid_tokens=tokens.numel(),
            weight=settings.weight,
            context_parallel=settings.context_parallel,
        )

    def _build_packed(self, index: int, settings: PackedDistillation, packs: Sequence[Pack]) -> MicroBatch:
        """A document's last token asks for no next one, nor does padding, which counts as one more document."""
        tokens = torch.from_numpy(np.stack([pack.tokens for pack in packs]))
        documents = [[*pack.lengths, length] if (length := pack.num_padding) else pack.lengths for pack in packs]
        labels = tokens.roll(-1, dims=1)
        position_ids = positions.natural(*tokens.shape)
        for row, (pack, lengths) in enumerate(zip(packs, documents, strict=True)):
            labels[row, np.cumsum(pack.lengths) - 1] = NO_LOSS
            labels[row, len(pack.tokens) - pack.num_padding :] = NO_LOSS
            if settings.restart_positions:
                position_ids[row] = torch.cat([torch.arange(length) for length in lengths])
        return MicroBatch(
            index=index,
            objective="packed_distillation",
            tokens=tokens,
            labels=labels,
            student_positions=position_ids,
            teacher_positions=position_ids if settings.needs_teacher else None,
            num_valid_tokens=max(1, int((labels != NO_LOSS).sum())),
            weight=settings.weight,
            context_parallel=settings.context_parallel,
            documents=documents if settings.mask_documents else None,
        )

    def padding_fractions(self) -> dict[str, float]:
        """Padding's share of the tokens of each packed data set, by prefix, estimated from its first block."""
        sets = [packed for source in self._packs.values() for packed in source.sets]
        return {packed.prefix: packed.padding_fraction() for packed in sets if isinstance(packed, PackedSequences)}


def open_data(recipes: Iterable[Recipe]) -> list[MicroBatchSource]:
    """The data of each recipe, the phases of a run. Raises `UserError` with the problems of all."""
    sources, problems = [], []
    for recipe in recipes:
        try:
            sources.append(MicroBatchSource(recipe))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return sources


def _places(counts: dict[str, int]) -> list[tuple[str, int]]:
    """For each micro-batch of a step: its objective, and its number (from 0) among those of the objective."""
    order = microbatch_order(counts)
    return [(objective, order[:index].count(objective)) for index, objective in enumerate(order)]


def stable_hash(*parts: str | int) -> int:
    """63 bits that depend on `parts` alone; Python's own `hash` of a text changes with every process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def dump(microbatches: Sequence[MicroBatch], folder: Path, *, step: int, replica: int) -> Path:
    """Writes the micro-batches of one step and replica to `folder`/step-00001.dp-0.safetensors.

    For micro-batch i of the list: `<i>.tokens`, `<i>.labels` (-100 = no loss), `<i>.student_positions`,
    `<i>.teacher_positions` where there is a teacher, and `<i>.documents` (the number of each token's document in its
    sequence, from 0) where documents do not see each other; each [sequences, sequence_length], int64. Header metadata
    `objectives`: the JSON list of their names. Returns the file's path.
    """
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(microbatches):
        tensors[f"{i}.tokens"] = batch.tokens
        tensors[f"{i}.labels"] = batch.labels
        tensors[f"{i}.student_positions"] = batch.student_positions
        if batch.teacher_positions is not None:
            tensors[f"{i}.teacher_positions"] = batch.teacher_positions.clone()  # may be the student's
        if batch.documents is not None:
            lengths = [torch.tensor(row) for row in batch.documents]
            numbers = [torch.arange(len(row)).repeat_interleave(row) for row in lengths]
            tensors[f"{i}.documents"] = torch.stack(numbers)
    path = folder / f"step-{step:05d}.dp-{replica}.safetensors"
    with appearing_whole(path) as partial:
        save_file(tensors, partial, metadata={"objectives": json.dumps([batch.objective for batch in microbatches])})
    return path
