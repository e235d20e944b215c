"""The order in which a pipeline stage runs its micro-batches: Megatron's 1F1B and interleaved schedules."""

from typing import NamedTuple


class Pass(NamedTuple):
    """One pass of a micro-batch through a chunk of a stage. Both are counted from 0."""

    chunk: int
    microbatch: int
    backward: bool


def stage_passes(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[Pass]:
    """All passes of one stage in one step, in order.

    With w warm-up passes: w forward ones, then a forward and a backward one in turn, then the backward ones left.
    1F1B: w = num_stages - stage - 1. Interleaved, with num_chunks chunks a stage: w = 2 (num_stages - stage - 1) +
    (num_chunks - 1) num_stages; micro-batches go through the chunks in groups of num_stages
    (Megatron-LM, core/pipeline_parallel/schedules.py).
    """
    forward = _in_groups(num_stages, num_chunks, num_microbatches)
    backward = [(num_chunks - 1 - chunk, microbatch) for chunk, microbatch in forward]
    warm_up = num_stages - stage - 1
    if num_chunks > 1:
        warm_up = 2 * warm_up + (num_chunks - 1) * num_stages
    warm_up = min(warm_up, len(forward))
    passes = [Pass(*each, False) for each in forward[:warm_up]]
    for number, each in enumerate(forward[warm_up:]):
        passes += [Pass(*each, False), Pass(*backward[number], True)]
    return passes + [Pass(*each, True) for each in backward[len(forward) - warm_up :]]


def _in_groups(num_stages: int, num_chunks: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) of the forward passes: a group of micro-batches through one chunk after the other."""
    size = num_stages if num_chunks > 1 else num_microbatches
    return [
        (chunk, microbatch)
        for first in range(0, num_microbatches, size)
        for chunk in range(num_chunks)
        for microbatch in range(first, min(first + size, num_microbatches))
    ]
