"""The micro-batches of each optimizer step: tokens, labels and position ids of every objective.

All of it is a pure function of the recipe and the step's number.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longred_megatron.data.sequences import SequenceSource
from longred_megatron.errors import UserError
from longred_megatron.files import appearing_whole, save_tensors
from longred_megatron.objectives.base import Batch, Groups, Objective, Tap
from longred_megatron.parallel.context import cut_for_context_rank
from longred_megatron.planning.order import microbatch_order, replica_indices
from longred_megatron.recipe import Phase


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Batch):
    """n sequences of s tokens that one objective trains on."""

    index: int  # within the step, over all replicas
    objective: str  # its name in the recipe
    settings: Objective
    student_length: int | None = None  # largest position + 1 of the whole micro-batch; known once it is cut
    teacher_length: int | None = None
    keys: Sequence[Mapping[Tap, str]] | None = None  # of the teacher's values of each sequence, where they are kept
    cached: Mapping[Tap, Tensor] | None = None  # this rank's part of them, if they are there


class MicroBatchSource:
    """Micro-batches by step number; a resumed run needs no other state.

    Each objective walks through its data in an order of its own: sequence j of its i-th micro-batch in step t
    (from 1) is sample ((t - 1) * microbatches + i) * n + j of its `SequenceSource`, where
    n = tokens_per_microbatch / sequence_length. Steps are numbered over the whole run: an objective whose data and
    counts stay the same from one phase to the next goes on where it was. Where they change, it goes on where it would
    be had they been so from the first step.

    Raises: `UserError` with the problems of all data sets.
    """

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        objectives, recipe = phase.recipe.objectives, phase.recipe
        counts = {name: settings.microbatches for name, settings in objectives.items()}
        self._places = _places(microbatch_order(counts, phase.needs))
        self._sources: dict[str, SequenceSource[Any]] = {}
        problems: list[str] = []
        for name, settings in objectives.items():
            seed = stable_hash(recipe.training.seed, "order", name, settings.data)
            blend, length = recipe.data[settings.data], settings.sequence_length
            try:
                self._sources[name] = SequenceSource(settings.series(), blend, length, seed)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*dict.fromkeys(problems))  # two objectives may use the same files

    def step(self, step: int, replica: int, num_replicas: int) -> list[MicroBatch]:
        """The micro-batches that `replica` of `num_replicas` trains in step `step` (from 1), in order."""
        indices = replica_indices(len(self._places), replica, num_replicas)
        return [self._build(step, index, *self._places[index]) for index in indices]

    def _build(self, step: int, index: int, objective: str, place: int) -> MicroBatch:
        recipe = self._phase.recipe
        settings = recipe.objectives[objective]
        num_sequences = recipe.step.tokens_per_microbatch // settings.sequence_length
        first = ((step - 1) * settings.microbatches + place) * num_sequences
        samples = [self._sources[objective][sample] for sample in range(first, first + num_sequences)]
        seed = stable_hash(recipe.training.seed, "positions", objective, step, place)
        batch = settings.batch(samples, torch.Generator().manual_seed(seed), self._phase.sites[objective])
        has_teacher = batch.teacher_positions is not None
        assert has_teacher == self._phase.needs[objective].teacher, f"{settings.kind}: teacher positions against needs"
        return MicroBatch(**vars(batch), index=index, objective=objective, settings=settings)

    def prefixes(self) -> list[str]:
        """Of its data sets."""
        return [each.prefix for source in self._sources.values() for each in source.sets]

    def padding_fractions(self) -> dict[str, float]:
        """Padding's share of the tokens of each packed data set, by prefix, estimated from its first block."""
        series = [each for source in self._sources.values() for each in source.sets]
        return {each.prefix: share for each in series if (share := each.padding_fraction()) is not None}


def open_data(phases: Iterable[Phase]) -> list[MicroBatchSource]:
    """The data of each phase of a run. Raises `UserError` with the problems of all."""
    sources, problems = [], []
    for phase in phases:
        try:
            sources.append(MicroBatchSource(phase))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return sources


def _places(order: Sequence[str]) -> list[tuple[str, int]]:
    """For each micro-batch of a step: its objective, and its number (from 0) among those of the objective."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(objective, next(numbers[objective])) for objective in order]


def stable_hash(*parts: str | int) -> int:
    """63 bits that depend on `parts` alone; Python's own `hash` of a text changes with every process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def local_part(microbatch: MicroBatch, groups: Groups) -> MicroBatch:
    """That of this context-parallel rank, on its device."""
    device, cp = torch.cuda.current_device(), groups.cp
    whole, documents = microbatch.settings.whole_sequences, microbatch.documents
    if documents is not None and whole:
        share = len(documents) // cp.size()
        documents = documents[cp.rank() * share : (cp.rank() + 1) * share]

    def cut(x: Tensor) -> Tensor:
        return cut_for_context_rank(x, cp.rank(), cp.size(), whole).to(device, non_blocking=True)

    return replace(
        microbatch,
        tokens=cut(microbatch.tokens),
        labels=cut(microbatch.labels),
        student_positions=cut(microbatch.student_positions),
        teacher_positions=None if microbatch.teacher_positions is None else cut(microbatch.teacher_positions),
        uniforms=None if microbatch.uniforms is None else cut(microbatch.uniforms),
        documents=documents,
        student_length=_length(microbatch.student_positions),
        teacher_length=_length(microbatch.teacher_positions),
    )


def _length(positions: Tensor | None) -> int | None:
    """Largest position + 1, of the whole micro-batch: all context ranks must rotate alike."""
    return None if positions is None else int(positions.max()) + 1


def dump(microbatches: Sequence[MicroBatch], folder: Path, *, step: int, replica: int) -> Path:
    """Writes the micro-batches of one step and replica to `folder`/step-00001.dp-0.safetensors.

    For micro-batch i of the list: `<i>.tokens`, `<i>.labels` (-100 = no loss), `<i>.student_positions`,
    `<i>.teacher_positions` where there is a teacher, and `<i>.documents` (the number of each token's document in its
    sequence, from 0) where documents do not see each other; each [sequences, sequence_length], int64. `<i>.uniforms`
    [sequences, sequence_length, draws], fp32, where entries of the teacher's vocabulary are drawn. Header metadata
    `objectives`: the JSON list of their names. Returns the file's path.
    """
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(microbatches):
        tensors[f"{i}.tokens"] = batch.tokens
        tensors[f"{i}.labels"] = batch.labels
        tensors[f"{i}.student_positions"] = batch.student_positions
        if batch.teacher_positions is not None:
            tensors[f"{i}.teacher_positions"] = batch.teacher_positions.clone()  # may be the student's
        if batch.uniforms is not None:
            tensors[f"{i}.uniforms"] = batch.uniforms
        if batch.documents is not None:
            lengths = [torch.tensor(row) for row in batch.documents]
            numbers = [torch.arange(len(row)).repeat_interleave(row) for row in lengths]
            tensors[f"{i}.documents"] = torch.stack(numbers)
    path = folder / f"step-{step:05d}.dp-{replica}.safetensors"
    with appearing_whole(path) as partial:
        save_tensors(tensors, partial, {"objectives": json.dumps([batch.objective for batch in microbatches])})
    return path
