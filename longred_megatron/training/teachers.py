"""What the teachers say of a step's micro-batches: computed on the student's pipeline stages, or read from a cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from longred_megatron.model.chunk import ModelChunk
from longred_megatron.objectives.base import Tap
from longred_megatron.recipe import Phase
from longred_megatron.training.cached_targets import CachedTargets
from longred_megatron.training.losses import head_entries
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.schedule import run_forward_only

Targets = dict[Tap, Tensor]  # of a micro-batch: {the teacher's tap: its value}


@dataclass
class Teachers:
    """The frozen models of a phase.

    student: its chunks, for objectives whose teacher it is.
    build: makes a teacher's chunks with its weights, out of the folder it comes from; with its head alone, or whole.
    cache: what earlier runs have kept.
    models: by folder; a teacher whose values are all in the cache has no layers here, or is missing.
    """

    phase: Phase
    groups: ProcessGroupCollection
    student: Sequence[ModelChunk]
    build: Callable[[Path, bool], list[ModelChunk]]
    cache: CachedTargets
    models: dict[Path, list[ModelChunk]] = field(default_factory=dict)
    _whole: set[Path] = field(default_factory=set)
    _asked: set[int] = field(default_factory=set)  # numbers within the step

    def __post_init__(self) -> None:
        for hf in self.phase.teachers:
            taught = self.phase.taught_by(hf)
            if not self.cache.keeps(taught):
                self._build_whole(hf)
            elif any(needs.teacher_head and not needs.teacher_entries for needs in taught.values()):
                self.models[hf] = self.build(hf, False)

    def of(self, microbatch: MicroBatch) -> Sequence[ModelChunk]:
        """The model that a micro-batch is compared with; none, or the student itself as it is now."""
        if self.phase.needs[microbatch.objective].teacher_is_student:
            return self.student
        teacher = self.phase.teacher_of(microbatch.objective)
        return () if teacher is None else self.models.get(teacher, ())

    def begin_step(self, microbatches: Sequence[MicroBatch]) -> list[Targets]:
        """Finds out what has to be asked. With several stages it is asked here: a pass of each teacher.

        microbatches: this rank's part of this replica's. Every rank of the world calls it.
        """
        targets: list[Targets] = [dict(m.cached or {}) for m in microbatches]
        missing = self.cache.missing(microbatches)
        for hf in self.phase.teachers:
            if missing.intersection(self.phase.taught_by(hf)):
                self._build_whole(hf)
        self._asked = {m.index for m in microbatches if self._has_teacher(m) and self.cache.lacks(m.index)}
        if self.groups.pp.size() > 1:
            self._passes(microbatches, targets)
        return targets

    def finish(self, microbatch: MicroBatch, targets: Targets) -> None:
        """Just before the student's pass of a micro-batch: with one stage its teacher is asked here.

        Targets that come from the cache are moved to the device.
        """
        if microbatch.index in self._asked and self.groups.pp.size() == 1:
            targets.clear()
            self._ask(microbatch, self.of(microbatch)[0], targets)
            self._keep(microbatch, targets)
        device = torch.cuda.current_device()
        for tap, value in targets.items():
            targets[tap] = value.to(device, non_blocking=True)

    def close(self) -> None:
        """Waits for the cache's files."""
        self.cache.close()

    def _has_teacher(self, microbatch: MicroBatch) -> bool:
        return self.phase.needs[microbatch.objective].teacher

    def _build_whole(self, hf: Path) -> None:
        if hf not in self._whole:
            self.models[hf] = self.build(hf, True)
            self._whole.add(hf)

    def _keep(self, microbatch: MicroBatch, targets: Targets) -> None:
        if not self.phase.needs[microbatch.objective].teacher_is_student:
            self.cache.keep(microbatch, targets)

    @torch.no_grad()
    def _ask(self, microbatch: MicroBatch, chunk: ModelChunk, targets: Targets) -> Tensor:
        """Runs a chunk of the micro-batch's teacher, keeps what the loss needs of it, and returns its output."""
        needs, last = self.phase.needs[microbatch.objective], Tap(chunk.architecture.num_layers)
        output, values = chunk(
            microbatch.tokens,
            microbatch.teacher_positions,
            needs.teacher_taps(last.layer),
            microbatch.settings.whole_sequences,
            microbatch.documents,
            microbatch.teacher_length,
        )
        # `detach`: the schedule frees what it has sent, and a stage's last state is its output.
        targets |= {tap: value.detach() for tap, value in values.items()}
        if needs.teacher_entries and last in targets:
            few, uniforms = needs.teacher_entries, microbatch.uniforms
            targets[few.tap] = head_entries(chunk, targets[last], few, uniforms, self.groups)
            if last not in needs.pairs.values():
                del targets[last]
        return output

    @torch.no_grad()
    def _passes(self, microbatches: Sequence[MicroBatch], targets: Sequence[Targets]) -> None:
        """A forward-only pipelined pass of each teacher over its micro-batches; every stage keeps its own layers."""
        # By teacher, each known by its first chunk; in the order of the micro-batches, the same on every rank.
        passes: dict[int, tuple[Sequence[ModelChunk], list[int]]] = {}
        for i, microbatch in enumerate(microbatches):
            if microbatch.index in self._asked:
                targets[i].clear()
                chunks = self.of(microbatch)
                passes.setdefault(id(chunks[0]), (chunks, []))[1].append(i)

        def forward(iterator: Iterator[int], chunk: ModelChunk) -> tuple[Tensor, None]:
            i = next(iterator)
            output = self._ask(microbatches[i], chunk, targets[i])
            # The last stage has nobody to send to; its states are kept above.
            return output if not chunk.post_process else output[:0], None

        for chunks, taught in passes.values():
            run_forward_only(self.phase.recipe, forward, chunks, taught)
            for i in taught:
                self._keep(microbatches[i], targets[i])
