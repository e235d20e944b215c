"""Faults that layouts are known to suffer from, made on purpose: the comparison with one process must see each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel

from longred_megatron.checkpoint import distributed
from longred_megatron.model import chunk, injection
from longred_megatron.model.fp8 import sharded_scales
from longred_megatron.objectives.base import Groups, Term
from longred_megatron.objectives.relations import Relations
from longred_megatron.parallel import context
from longred_megatron.training import metrics, microbatches, step
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.teachers import Teachers
from tests.doctor.faults import border_early_by_one, border_late_by_one


@contextmanager
def positions_not_cut() -> Iterator[None]:
    """Every context-parallel rank takes the first of the positions, not its own."""
    cut = step.local_part

    def faulty(microbatch: MicroBatch, groups: Groups) -> MicroBatch:
        local, size = cut(microbatch, groups), groups.cp.size()
        return replace(local, student_positions=microbatch.student_positions.chunk(size, dim=1)[0])

    with patch.object(step, "local_part", faulty):
        yield


@contextmanager
def positions_cut_twice() -> Iterator[None]:
    """A rank takes its part of the positions that are its part already."""
    cut = step.local_part

    def faulty(microbatch: MicroBatch, groups: Groups) -> MicroBatch:
        local, (rank, size) = cut(microbatch, groups), (groups.cp.rank(), groups.cp.size())
        twice = context.cut_for_context_rank(local.student_positions, rank, size, whole_sequences=False)
        return replace(local, student_positions=twice.repeat(1, size))

    with patch.object(step, "local_part", faulty):
        yield


@contextmanager
def neighbouring_pieces() -> Iterator[None]:
    """Every context-parallel rank gets two neighbouring pieces of a sequence, where attention expects the zig-zag."""

    def faulty(x: torch.Tensor, rank: int, size: int, whole_sequences: bool) -> torch.Tensor:
        return x.chunk(size, dim=0 if whole_sequences else 1)[rank]

    with patch.object(microbatches, "cut_for_context_rank", faulty):
        yield


@contextmanager
def scales_lost() -> Iterator[None]:
    """A checkpoint is loaded without FP8's scales."""
    load = distributed.load

    def faulty(path: Any, chunks: Any, optimizer: Any = None) -> None:
        load(path, chunks, optimizer)
        for name, scale in sharded_scales(chunks).items():
            scale.data.fill_(1.0 if name.endswith("scale") else 0.0)

    with patch.object(distributed, "load", faulty):
        yield


@contextmanager
def length_of_own_rank() -> Iterator[None]:
    """A RoPE that depends on the length takes the largest position of the rank's own part."""
    cut = step.local_part

    def faulty(microbatch: MicroBatch, groups: Groups) -> MicroBatch:
        local = cut(microbatch, groups)
        return replace(local, student_length=int(local.student_positions.max()) + 1)

    with patch.object(step, "local_part", faulty):
        yield


@contextmanager
def weight_of_another_microbatch() -> Iterator[None]:
    """The scale of an injected loss is kept in the class, as in Megatron's auxiliary losses."""

    class Injected(torch.autograd.Function):
        latest = torch.ones(())

        @staticmethod
        def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
            ctx.value = loss.detach()
            Injected.latest = loss.detach()
            return output.view_as(output)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return gradient, Injected.latest / ctx.value

    with patch.object(injection._InjectLoss, "apply", Injected.apply):
        yield


@contextmanager
def loss_counted_per_tensor_rank() -> Iterator[None]:
    """The share that every tensor rank holds of a loss is summed over them."""

    def faulty(self: metrics.LossReducer, objectives: Any, groups: Any) -> None:
        initialize(self, objectives, SimpleNamespace(tp=groups.cp))  # of one rank here

    initialize = metrics.LossReducer.__init__
    with patch.object(metrics.LossReducer, "__init__", faulty):
        yield


@contextmanager
def gradient_of_context_ranks_lost() -> Iterator[None]:
    """Keys and values get the gradient of their own rank's queries alone."""
    gather = context.gather_from_sequence_parallel_region

    def faulty(x: torch.Tensor, group: Any) -> torch.Tensor:
        return gather(x, tensor_parallel_output_grad=False, group=group)

    with patch.object(context, "gather_from_sequence_parallel_region", faulty):
        yield


@contextmanager
def neighbours_swapped() -> Iterator[None]:
    """Megatron's default for two interleaved stages: both neighbours are one rank, and messages have no names."""
    build = chunk.transformer_config

    def faulty(*arguments: Any, **settings: Any) -> Any:
        config = build(*arguments, **settings)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    with patch.object(chunk, "transformer_config", faulty):
        yield


@contextmanager
def term_counted_per_tensor_rank() -> Iterator[None]:
    """A share that is split over the tensor ranks is said to be the same on each."""

    def faulty(self: Relations, *arguments: Any) -> list[Term]:
        return [term._replace(copies="each tensor rank") for term in loss(self, *arguments)]

    loss = Relations.loss
    with patch.object(Relations, "loss", faulty):
        yield


@contextmanager
def tap_of_another_microbatch() -> Iterator[None]:
    """A layer keeps what its other values are computed from; with several micro-batches under way it is another's."""
    latest: dict[int, torch.Tensor] = {}

    def faulty(layer: Any, hidden: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
        before, latest[id(layer)] = latest.get(id(layer), hidden), hidden
        return values(layer, before.detach() if hidden.requires_grad else hidden, *arguments)

    values = chunk.attention_values
    with patch.object(chunk, "attention_values", faulty):
        yield


@contextmanager
def teacher_of_another_objective() -> Iterator[None]:
    """All objectives are compared with the first teacher."""
    chosen = Teachers.of

    def faulty(self: Teachers, microbatch: MicroBatch) -> Any:
        own = chosen(self, microbatch)
        return next(iter(self.models.values())) if own and microbatch.settings.teacher else own

    with patch.object(Teachers, "of", faulty):
        yield


@contextmanager
def head_not_gathered() -> Iterator[None]:
    """With `overlap_param_gather`, what is read outside of its module is left to the module's hook."""
    finish = step.finish_gather

    def faulty(chunk: DistributedDataParallel, weight: torch.nn.Parameter | None = None) -> None:
        if weight is None:
            finish(chunk)

    with patch.object(step, "start_gather", lambda chunks: None), patch.object(step, "finish_gather", faulty):
        yield


@contextmanager
def teacher_asked() -> Iterator[None]:
    """No fault: the step ends where it runs a frozen teacher."""
    ask = Teachers._ask

    def refuse(self: Teachers, microbatch: MicroBatch, *arguments: Any) -> torch.Tensor:
        assert self.phase.needs[microbatch.objective].teacher_is_student, f"{microbatch.objective}: asks its teacher"
        return ask(self, microbatch, *arguments)

    with patch.object(Teachers, "_ask", refuse):
        yield


SABOTAGE: dict[str, Callable[[], AbstractContextManager[None]]] = {
    fault.__name__: fault
    for fault in (
        positions_not_cut,
        positions_cut_twice,
        neighbouring_pieces,
        border_late_by_one,
        border_early_by_one,
        scales_lost,
        length_of_own_rank,
        weight_of_another_microbatch,
        loss_counted_per_tensor_rank,
        gradient_of_context_ranks_lost,
        neighbours_swapped,
        term_counted_per_tensor_rank,
        tap_of_another_microbatch,
        teacher_of_another_objective,
        head_not_gathered,
        teacher_asked,
    )
}
