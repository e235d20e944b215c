"""The teacher cache of a phase: reads a step's values ahead, finds out what is missing, keeps what was computed."""

from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from longred_megatron.device import on_gpu
from longred_megatron.files import reason
from longred_megatron.objectives.base import HeadEntries, Tap
from longred_megatron.planning.order import microbatch_order
from longred_megatron.recipe import Phase
from longred_megatron.teacher_cache.keys import TeacherKeys
from longred_megatron.teacher_cache.parts import Parts
from longred_megatron.teacher_cache.store import TargetStore
from longred_megatron.training.microbatches import MicroBatch

MOST_WAITING = 16  # values on their way to the disk: then training waits for it


@dataclass(frozen=True)
class _Place:
    """Where the values of an objective's teacher are kept. taps: those of this pipeline stage."""

    store: TargetStore
    keys: TeacherKeys
    few: HeadEntries | None
    taps: tuple[Tap, ...]


class CachedTargets:
    """Of the objectives whose teacher has a `cache`; of none, it does nothing."""

    def __init__(self, phase: Phase, groups: ProcessGroupCollection) -> None:
        recipe, self._groups, self._sequence = phase.recipe, groups, phase.recipe.parallel.sequence
        self._order = microbatch_order({n: o.microbatches for n, o in recipe.objectives.items()}, phase.needs)
        self._places: dict[str, _Place] = {}

        @cache
        def keys_of(hf: Path, number_format: str) -> TeacherKeys:
            return TeacherKeys(hf, phase.teachers[hf], recipe.precision.of_teacher(), number_format)

        for name, folder in phase.caches().items():
            hf, number_format = recipe.teacher_of(name).hf, recipe.teacher_of(name).cache_format
            num_layers = phase.teachers[hf].num_layers
            stages = recipe.parallel.for_depth(num_layers).layer_stages(num_layers)
            taps = sorted(phase.needs[name].kept_taps(num_layers))
            self._places[name] = _Place(
                TargetStore(folder, number_format),
                keys_of(hf, number_format),
                phase.needs[name].teacher_entries,
                tuple(tap for tap in taps if stages[tap.layer] == groups.pp.rank()),
            )
        self._missing: set[int] = set(range(len(self._order)))
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-cache")
        self._writes: deque[Future[None]] = deque()
        self._told = set[str]()
        self._unwritten = ""  # why no more is kept

    def keeps(self, objectives: Collection[str]) -> bool:
        """Whether it has a place for the teacher's values of all of these."""
        return all(name in self._places for name in objectives)

    def read(self, microbatches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The same whole micro-batches with what is kept for this rank's part of them; once. May run in a thread."""
        places = (None if m.keys else self._places.get(m.objective) for m in microbatches)
        return [self._read(m, place) if place else m for m, place in zip(microbatches, places, strict=True)]

    def missing(self, microbatches: Sequence[MicroBatch]) -> set[str]:
        """The objectives that some rank of the world lacks values of in this step; all ranks ask at once."""
        if not self._places:
            return set()
        flags = torch.zeros(len(self._order), dtype=torch.int32)
        for microbatch in microbatches:
            flags[microbatch.index] = microbatch.objective in self._places and microbatch.cached is None
        flags = flags.to(torch.cuda.current_device())
        # The world: all ranks of a replica ask its teacher, or none; and a teacher is built on all ranks at once.
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        lacking = set(flags.nonzero().flatten().tolist())
        self._missing = lacking | {i for i, name in enumerate(self._order) if name not in self._places}
        return {self._order[i] for i in lacking}

    def lacks(self, index: int) -> bool:
        """Whether the teacher has to be asked for a micro-batch, by its number in the step."""
        return index in self._missing

    def found(self) -> list[str]:
        """The objectives of the step's micro-batches whose teacher need not be asked, one for each."""
        return [name for i, name in enumerate(self._order) if i not in self._missing]

    def keep(self, microbatch: MicroBatch, targets: dict[Tap, Tensor]) -> None:
        """Writes a micro-batch's values, and leaves in `targets` what a later run will read. All ranks of a replica."""
        place = self._places.get(microbatch.objective)
        if place is None:
            return
        assert microbatch.keys is not None
        parts = self._parts(microbatch)
        for tap in place.taps:
            whole, exact = parts.whole(targets[tap], tap), targets[tap]
            targets[tap] = place.store.rounded(exact)
            self._tell_error(microbatch.objective, exact, targets[tap])
            for number, keys in enumerate(microbatch.keys):
                if parts.is_own(number):
                    self._submit(place.store, keys[tap], whole[number].cpu())

    def why_unwritten(self) -> str:
        """Why some rank of the world keeps no more, as of a full disk; empty: all do. All ranks ask at once."""
        reasons: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reasons, self._unwritten)  # the world: all go on, or none
        return next(filter(None, reasons), "")

    def close(self) -> None:
        """Waits for the files."""
        self._writer.shutdown()
        for write in self._writes:
            write.result()

    def _parts(self, microbatch: MicroBatch) -> Parts:
        settings, keys = microbatch.settings, microbatch.keys
        assert keys is not None
        length = settings.sequence_length
        return Parts(len(keys), length, settings.whole_sequences, self._sequence, self._groups)

    def _read(self, microbatch: MicroBatch, place: _Place) -> MicroBatch:
        positions = microbatch.teacher_positions
        assert positions is not None
        length = int(positions.max()) + 1
        keys = place.keys.of(microbatch.tokens, positions, microbatch.documents, length, place.taps, place.few)
        asked = replace(microbatch, keys=keys)
        parts, found = self._parts(asked), {}
        for tap in place.taps:
            rows: list[Tensor] = []
            for number, start, stop in parts.runs(tap):
                part = place.store.read(keys[number][tap], start, stop)
                if part is None:
                    return asked
                rows.append(part)
            value = parts.own_heads(torch.cat(rows).unsqueeze(1), tap).contiguous()
            found[tap] = value.pin_memory() if on_gpu() else value
        return replace(asked, cached=found)

    def _tell_error(self, objective: str, exact: Tensor, kept: Tensor) -> None:
        """Once for each objective, how far what is kept is from what the teacher says."""
        if kept is exact or objective in self._told:
            return
        self._told.add(objective)
        error = float((kept.float() - exact.float()).norm() / exact.float().norm())
        if self._groups.tp.rank() == self._groups.cp.rank() == self._groups.dp.rank() == 0:
            print(f"teacher.cache: {objective}: fp8 differs by {error:.2%} (root mean square)", flush=True)

    def _submit(self, store: TargetStore, key: str, value: Tensor) -> None:
        while len(self._writes) >= MOST_WAITING:
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(self._write, store, key, value))

    def _write(self, store: TargetStore, key: str, value: Tensor) -> None:
        if self._unwritten:
            return
        try:
            store.write(key, value)
        except OSError as error:
            self._unwritten = f"teacher.cache: {store.folder}: {reason(error)}"
            print(f"{self._unwritten}; this rank keeps no more")
