"""One optimizer step: the teacher's pass, the student's pass, the update."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from longred_megatron.model.injection import inject_loss
from longred_megatron.model.stage import Stage
from longred_megatron.parallel.context import cut_for_context_rank
from longred_megatron.recipe import Recipe
from longred_megatron.training.losses import stage_losses
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.order import TOKEN_OBJECTIVES

Targets = list[dict[int, Tensor]]  # per micro-batch: {layer: teacher's hidden states}


@dataclass
class StepResult:
    """What this rank saw in one step."""

    losses: list[dict[str, Tensor]]  # per micro-batch, see `stage_losses`
    grad_norm: float
    teacher_seconds: float


@dataclass
class TrainStep:
    """Trains the student on one step's micro-batches. `layers`: see `compared_layers`."""

    recipe: Recipe
    student: Sequence[DistributedDataParallel]
    teacher: Sequence[Stage]
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection
    layers: dict[str, dict[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        stages = (self.student[0].module, self.teacher[0] if self.teacher else self.student[0].module)
        self.layers = compared_layers(self.recipe, *(stage.architecture.num_layers for stage in stages))

    def __call__(self, microbatches: Sequence[MicroBatch]) -> StepResult:
        """Trains on this replica's micro-batches of one step."""
        losses, teacher_seconds = self.forward_backward(microbatches)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(losses, float(grad_norm), teacher_seconds)

    def forward_backward(self, microbatches: Sequence[MicroBatch]) -> tuple[list[dict[str, Tensor]], float]:
        """Leaves the step's reduced gradients in `main_grad`; returns the losses and the teacher's seconds.

        Args:
            microbatches: this replica's, whole; cut here for this rank of the context axis.
        """
        local = [self._cut(m) for m in microbatches]
        started = time.perf_counter()
        targets = self._teacher_pass(local)
        teacher_seconds = time.perf_counter() - started
        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._student_pass(local, targets), teacher_seconds

    def _cut(self, microbatch: MicroBatch) -> MicroBatch:
        """The part of this context-parallel rank, on its device."""
        device, cp = torch.cuda.current_device(), self.groups.cp
        whole, documents = microbatch.context_parallel == 1, microbatch.documents
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
        )

    @torch.no_grad()
    def _teacher_pass(self, microbatches: Sequence[MicroBatch]) -> Targets:
        """One forward-only pipelined pass over the taught micro-batches; every stage keeps its own layers."""
        targets: Targets = [{} for _ in microbatches]
        taught = [(i, m) for i, m in enumerate(microbatches) if m.teacher_positions is not None]
        if not taught:
            return targets
        if self.recipe.parallel.virtual_pipeline:
            # The interleaved schedule takes one group of any size from the number of stages on: it is filled up.
            taught += taught[-1:] * (self.groups.pp.size() - len(taught))
            self.teacher[0].config.microbatch_group_size_per_vp_stage = len(taught)

        def forward(iterator: Iterator[tuple[int, MicroBatch]], stage: Stage) -> tuple[Tensor, None]:
            i, microbatch = next(iterator)
            output, states = stage(
                microbatch.tokens,
                microbatch.teacher_positions,
                self.layers[microbatch.objective].values(),
                microbatch.context_parallel == 1,
                microbatch.documents,
            )
            # `detach`: the schedule frees what it has sent, and a stage's last state is its output.
            targets[i] |= {k: state.detach() for k, state in states.items()}
            # The last stage has nobody to send to; its states are kept above.
            return output if not stage.post_process else output[:0], None

        self._pipeline(forward, self.teacher, taught, forward_only=True)
        return targets

    def _student_pass(self, microbatches: Sequence[MicroBatch], targets: Targets) -> list[dict[str, Tensor]]:
        """Megatron's forward-backward schedule; gradients are reduced at its end. Returns the losses, detached."""
        losses: list[dict[str, Tensor]] = [{} for _ in microbatches]
        # Megatron applies this factor to what the last stage returns; losses of other stages get it here. The
        # gradient is averaged over data- and context-parallel ranks, but context ranks hold parts of one sum.
        scale = self.groups.cp.size() / len(microbatches)

        def forward(
            iterator: Iterator[tuple[int, MicroBatch]], chunk: DistributedDataParallel
        ) -> tuple[Tensor, object]:
            i, microbatch = next(iterator)
            stage: Stage = chunk.module
            output, states = chunk(
                microbatch.tokens,
                microbatch.student_positions,
                self.layers.get(microbatch.objective, ()),
                microbatch.context_parallel == 1,
                microbatch.documents,
            )
            stage_targets = {k: targets[i].pop(self.layers[microbatch.objective][k]) for k in states}
            settings = getattr(self.recipe.objectives, microbatch.objective)
            teacher = self.teacher[-1] if self.teacher else None
            own = stage_losses(stage, microbatch, settings, output, states, stage_targets, teacher, self.groups)
            losses[i] |= {name: loss.detach() for name, loss in own.items()}
            # `output[:0].sum()` is a zero that keeps the stage in the graph when it owes no loss.
            loss = microbatch.weight * sum(own.values(), start=output[:0].float().sum())
            if stage.post_process:
                return loss, lambda loss: (loss, None)
            if own:
                output = make_viewless_tensor(inject_loss(output, loss * scale), requires_grad=True, keep_graph=True)
            return output, None

        self._pipeline(forward, self.student, list(enumerate(microbatches)), forward_only=False)
        return losses

    def _pipeline(
        self,
        forward: Callable[..., tuple[Tensor, object]],
        chunks: Sequence[torch.nn.Module],
        work: Sequence[tuple[int, MicroBatch]],
        forward_only: bool,
    ) -> None:
        """Megatron's schedule for this layout; every message between stages is [tokens / cp / tp, 1, hidden]."""
        get_forward_backward_func(self.groups.pp.size(), self.recipe.parallel.virtual_pipeline)(
            forward_step_func=forward,
            data_iterator=[iter(work) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(work),
            seq_length=self.recipe.step.tokens_per_microbatch,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def compared_layers(recipe: Recipe, num_layers: int, num_teacher_layers: int) -> dict[str, dict[int, int]]:
    """{objective: {the student's layer: the teacher's}}, numbered as in Hugging Face `hidden_states`."""
    layers = {}
    last = {num_layers: num_teacher_layers}
    if recipe.objectives.short_restoration:
        layers["short_restoration"] = {k: k for k in recipe.objectives.short_restoration.layers}
    if recipe.objectives.short_to_long:
        layers["short_to_long"] = last  # the last hidden state only (LongReD, section 3.3)
    if wants_teacher_head(recipe):
        layers["packed_distillation"] = last  # what the heads make next-token distributions of
    return layers


def wants_teacher_head(recipe: Recipe) -> bool:
    """Whether any loss needs the teacher's next-token distributions."""
    packed = recipe.objectives.packed_distillation
    return packed is not None and packed.needs_teacher


def every_replica_ends_on_tokens(order: Sequence[str], num_replicas: int) -> bool:
    """Whether the last micro-batch of every replica reaches every parameter, as overlapped reduction needs."""
    return all(name in TOKEN_OBJECTIVES for name in order[-num_replicas:])
