"""One optimizer step: the teachers' values, the student's pass, the update."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from longred_megatron.model.chunk import ModelChunk
from longred_megatron.model.injection import inject_loss
from longred_megatron.objectives.base import Term
from longred_megatron.recipe import Phase
from longred_megatron.training.losses import chunk_terms
from longred_megatron.training.microbatches import MicroBatch, local_part
from longred_megatron.training.optimizer import finish_gather, start_gather
from longred_megatron.training.schedule import run_schedule
from longred_megatron.training.stopwatch import Stopwatch
from longred_megatron.training.teachers import Targets, Teachers


@dataclass
class StepResult:
    """What this rank saw in one step."""

    terms: list[list[Term]]  # per micro-batch, see `chunk_terms`; without graphs
    grad_norm: float
    teacher_seconds: float  # of the device


@dataclass
class TrainStep:
    """Trains the student on one step's micro-batches."""

    phase: Phase
    student: Sequence[DistributedDataParallel]
    teachers: Teachers
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
        local = [local_part(m, self.groups) for m in self.teachers.cache.read(microbatches)]
        teachers = Stopwatch()
        with teachers.running():
            targets = self.teachers.begin_step(local)
        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._student_pass(local, targets, teachers), teachers

    def _student_pass(
        self, microbatches: Sequence[MicroBatch], targets: Sequence[Targets], teachers: Stopwatch
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
            with teachers.running():
                self.teachers.finish(microbatch, targets[i])
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
            teacher = self.teachers.of(microbatch)
            terms = chunk_terms(
                chunk, teacher[-1] if teacher else None, microbatch, needs, output, values, targets[i], self.groups
            )
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

        run_schedule(self.phase.recipe, forward, self.student, list(enumerate(microbatches)), forward_only=False)
        return found
