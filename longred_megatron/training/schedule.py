"""Megatron's pipeline schedules, told the shape of the messages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from longred_megatron.model.chunk import ModelChunk
from longred_megatron.recipe import Recipe

Forward = Callable[..., tuple[Tensor, object]]
"""(iterator over the work, chunk) -> the chunk's output or loss, and what Megatron's `forward_step_func` returns
beside it."""


def run_schedule(
    recipe: Recipe, forward: Forward, chunks: Sequence[torch.nn.Module], work: Sequence[Any], forward_only: bool
) -> None:
    """Megatron's schedule for this layout; every message between stages is [tokens / cp / tp, 1, hidden].

    work: what `forward` takes for each micro-batch.
    """
    parallel = recipe.parallel
    get_forward_backward_func(parallel.pipeline, parallel.virtual_pipeline)(
        forward_step_func=forward,
        data_iterator=[iter(work) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(work),
        seq_length=recipe.step.tokens_per_microbatch,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def run_forward_only(recipe: Recipe, forward: Forward, chunks: Sequence[ModelChunk], work: Sequence[Any]) -> None:
    """A pass without gradients over any number of micro-batches; the last one may come several times."""
    if not recipe.parallel.virtual_pipeline:
        run_schedule(recipe, forward, chunks, work, forward_only=True)
        return
    # The interleaved schedule takes one group of any size from the number of stages on: it is filled up.
    filled = [*work, *[work[-1]] * (recipe.parallel.pipeline - len(work))]
    with _microbatch_group(chunks, len(filled)):
        run_schedule(recipe, forward, chunks, filled, forward_only=True)


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
