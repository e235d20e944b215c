"""One optimizer step: the teachers' values, the student's pass, the update."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from longred_megatron.model.chunk import ModelChunk
from longred_megatron.model.injection import inject_loss
from longred_megatron.objectives.base import Tap, Term
from longred_megatron.parallel.context import cut_for_context_rank
from longred_megatron.recipe import Phase
from longred_megatron.training.losses import chunk_terms
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.optimizer import finish_gather, start_gather
from longred_megatron.training.stopwatch import Stopwatch

Targets = list[dict[Tap, Tensor]]  # per micro-batch: {the teacher's tap: its value}


@dataclass
class StepResult:
    """What this rank saw in one step."""

    terms: list[list[Term]]  # per micro-batch, see `chunk_terms`; without graphs
    grad_norm: float
    teacher_seconds: float  # of the device


@dataclass
class TrainStep:
    """Trains the student on one step's micro-batches. teachers: the frozen models, by the folders they come from."""

    phase: Phase
    student: Sequence[DistributedDataParallel]
    teachers: Mapping[Path, Sequence[ModelChunk]]
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection

    def __call__(self, microbatches: Sequence[MicroBatch]) -> StepResult:
        """Trains on this replica's micro-batches of one step."""
        terms, teachers = self.forward_backward(microbatches)
        _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)  # waits for the device, which the stopwatch needs
        return StepResult(terms, grad_norm, teachers.seconds())

    def finish(self) -> None:
        """After a step, before the student's weights are read: all ranks have all of them."""
        for chunk in self.student:
            finish_gather(chunk)

    def forward_backward(self, microbatches: Sequence[MicroBatch]) -> tuple[list[list[Term]], Stopwatch]:
        """Leaves the step's reduced gradients in `main_grad`; returns the terms and the teachers' time.

        Args:
            microbatches: this replica's, whole; cut here for this rank of the context axis.
        """
        start_gather(self.student)
        local = [self._cut(m) for m in microbatches]
        teachers = Stopwatch()
        # With one stage the student's pass asks the teachers: just before it needs what they say.
        targets: Targets = [{} for _ in local]
        if self.groups.pp.size() > 1:
            with teachers.running():
                self._teacher_passes(local, targets)
        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._student_pass(local, targets, teachers), teachers

    def _cut(self, microbatch: MicroBatch) -> MicroBatch:
        """The part of this context-parallel rank, on its device."""
        device, cp = torch.cuda.current_device(), self.groups.cp
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
            documents=documents,
            student_length=_length(microbatch.student_positions),
            teacher_length=_length(microbatch.teacher_positions),
        )

    def _teacher_chunks(self, microbatch: MicroBatch) -> Sequence[ModelChunk]:
        """The model that a micro-batch is compared with; none, or the student itself as it is now."""
        if self.phase.needs[microbatch.objective].teacher_is_student:
            return [chunk.module for chunk in self.student]
        teacher = self.phase.teacher_of(microbatch.objective)
        return () if teacher is None else self.teachers[teacher]

    @torch.no_grad()
    def _ask_teacher(self, microbatch: MicroBatch, chunk: ModelChunk, targets: dict[Tap, Tensor]) -> Tensor:
        """Runs a chunk of the micro-batch's teacher, keeps what the loss needs of it, and returns its output."""
        output, values = chunk(
            microbatch.tokens,
            microbatch.teacher_positions,
            self.phase.needs[microbatch.objective].teacher_taps(chunk.architecture.num_layers),
            microbatch.settings.whole_sequences,
            microbatch.documents,
            microbatch.teacher_length,
        )
        # `detach`: the schedule frees what it has sent, and a stage's last state is its output.
        targets |= {tap: value.detach() for tap, value in values.items()}
        return output

    @torch.no_grad()
    def _teacher_passes(self, microbatches: Sequence[MicroBatch], targets: Targets) -> None:
        """A forward-only pipelined pass of each teacher over its micro-batches; every stage keeps its own layers."""
        # By teacher, each known by its first chunk; in the order of the micro-batches, the same on every rank.
        passes: dict[int, tuple[Sequence[ModelChunk], list[tuple[int, MicroBatch]]]] = {}
        for i, microbatch in enumerate(microbatches):
            if chunks := self._teacher_chunks(microbatch):
                passes.setdefault(id(chunks[0]), (chunks, []))[1].append((i, microbatch))
        for chunks, taught in passes.values():
            self._teacher_pass(chunks, taught, targets)

    def _teacher_pass(
        self, chunks: Sequence[ModelChunk], taught: list[tuple[int, MicroBatch]], targets: Targets
    ) -> None:
        def forward(iterator: Iterator[tuple[int, MicroBatch]], chunk: ModelChunk) -> tuple[Tensor, None]:
            i, microbatch = next(iterator)
            output = self._ask_teacher(microbatch, chunk, targets[i])
            # The last stage has nobody to send to; its states are kept above.
            return output if not chunk.post_process else output[:0], None

        if self.phase.recipe.parallel.virtual_pipeline:
            # The interleaved schedule takes one group of any size from the number of stages on: it is filled up.
            taught = taught + taught[-1:] * (self.groups.pp.size() - len(taught))
            with _microbatch_group(chunks, len(taught)):
                self._pipeline(forward, chunks, taught, forward_only=True)
        else:
            self._pipeline(forward, chunks, taught, forward_only=True)

    def _student_pass(
        self, microbatches: Sequence[MicroBatch], targets: Targets, teachers: Stopwatch
    ) -> list[list[Term]]:
        """Megatron's forward-backward schedule; gradients are reduced at its end. Returns the terms, detached."""
        found: list[list[Term]] = [[] for _ in microbatches]
        # Megatron applies this factor to what the last stage returns; losses of other stages get it here. The
        # gradient is averaged over data- and context-parallel ranks, but context ranks hold parts of one sum.
        scale = self.groups.cp.size() / len(microbatches)

        def forward(
            iterator: Iterator[tuple[int, MicroBatch]], wrapped: DistributedDataParallel
        ) -> tuple[Tensor, object]:
            i, microbatch = next(iterator)
            chunk: ModelChunk = wrapped.module
            needs = self.phase.needs[microbatch.objective]
            teacher = self._teacher_chunks(microbatch)
            if teacher and self.groups.pp.size() == 1:
                with teachers.running():
                    self._ask_teacher(microbatch, teacher[0], targets[i])
            output, values = wrapped(
                microbatch.tokens,
                microbatch.student_positions,
                needs.pairs,
                microbatch.settings.whole_sequences,
                microbatch.documents,
                microbatch.student_length,
            )
            if chunk.post_process:
                finish_gather(wrapped, chunk.head_weight())  # a loss reads it
            last = teacher[-1] if teacher else None
            terms = chunk_terms(chunk, last, microbatch, needs, output, values, targets[i], self.groups)
            if wrapped is self.student[-1]:
                targets[i].clear()  # no chunk of this stage will ask again
            found[i] += [term._replace(share=term.share.detach()) for term in terms]
            # `output[:0].sum()` is a zero that keeps the chunk in the graph when it owes no loss.
            loss = microbatch.settings.weight * sum((t.share for t in terms), start=output[:0].float().sum())
            if chunk.post_process:
                return loss, lambda loss: (loss, None)
            if terms:
                output = make_viewless_tensor(inject_loss(output, loss * scale), requires_grad=True, keep_graph=True)
            return output, None

        self._pipeline(forward, self.student, list(enumerate(microbatches)), forward_only=False)
        return found

    def _pipeline(
        self,
        forward: Callable[..., tuple[Tensor, object]],
        chunks: Sequence[torch.nn.Module],
        work: Sequence[tuple[int, MicroBatch]],
        forward_only: bool,
    ) -> None:
        """Megatron's schedule for this layout; every message between stages is [tokens / cp / tp, 1, hidden]."""
        get_forward_backward_func(self.groups.pp.size(), self.phase.recipe.parallel.virtual_pipeline)(
            forward_step_func=forward,
            data_iterator=[iter(work) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(work),
            seq_length=self.phase.recipe.step.tokens_per_microbatch,
            micro_batch_size=1,
            forward_only=forward_only,
        )


@contextmanager
def _microbatch_group(chunks: Sequence[ModelChunk], size: int) -> Iterator[None]:
    """The interleaved schedule's group of micro-batches for one pass; the student's own passes have another."""
    config = chunks[0].config
    before = config.microbatch_group_size_per_vp_stage
    config.microbatch_group_size_per_vp_stage = size
    try:
        yield
    finally:
        config.microbatch_group_size_per_vp_stage = before


def _length(positions: Tensor | None) -> int | None:
    """Largest position + 1, of the whole micro-batch: all context ranks must rotate alike."""
    return None if positions is None else int(positions.max()) + 1
