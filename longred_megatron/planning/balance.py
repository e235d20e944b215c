"""Layers moved between pipeline stages: from the one that works longest, or needs most memory, to one with more room.

The first chunk has the embedding, the last the head and its loss, and the first stage most micro-batches in flight, so
that equally many layers are seldom the best.
"""

from collections.abc import Iterator
from itertools import product

from longred_megatron.planning.candidate import Candidate
from longred_megatron.recipe import check_phases

MOST_TRIED = 2  # chunks of a stage


def balanced(candidate: Candidate) -> Candidate:
    """One layer after another is moved as long as the run gets faster or, where it does not fit, smaller."""
    while True:
        best = min(_moved(candidate), key=_order, default=candidate)
        if _order(best) >= _order(candidate):
            return candidate
        candidate = best


def least_hours(candidate: Candidate) -> float:
    """Not more than those of any split of its layers: as if all stages worked equally long. A micro-batch that takes
    less on the slowest stage saves that for every micro-batch, and for the stages that wait at both ends."""
    saved = 0.0
    for plan in candidate.plans:
        works = [sum(each.end - each.start for each in stage) for stage in plan.timeline]
        ends = (len(plan.order) + len(works) - 1) / len(plan.order)
        saved += (max(works) - sum(works) / len(works)) * ends * plan.phase.recipe.training.steps / 3600
    return candidate.hours - saved


def may_fit(candidate: Candidate) -> bool:
    """Whether there would be room if all stages needed equally much."""
    return sum(candidate.stage_bytes) <= candidate.gpu.memory_bytes * len(candidate.stage_bytes)


def _order(candidate: Candidate) -> tuple[bool, float]:
    return (False, candidate.hours) if candidate.fits else (True, candidate.needed_bytes)


def _moved(candidate: Candidate) -> Iterator[Candidate]:
    """With one layer of the fullest stage on the emptiest, for a few of the chunks of both. The recipe's checks accept
    all of them."""
    depth, pipeline = candidate.phases[0].source.num_layers, candidate.parallel.pipeline
    sizes = [len(layers) for layers in candidate.parallel.chunk_layers(depth)]
    chunks = [float(size) for size in sizes]
    stages = candidate.stage_bytes
    if candidate.fits:
        chunks = _chunk_seconds(candidate)
        stages = [sum(chunks[stage::pipeline]) for stage in range(pipeline)]
    fullest, emptiest = stages.index(max(stages)), stages.index(min(stages))
    if fullest == emptiest:
        return
    givers = [chunk for chunk in range(fullest, len(sizes), pipeline) if sizes[chunk] > 1]
    givers.sort(key=lambda chunk: -chunks[chunk])
    takers = sorted(range(emptiest, len(sizes), pipeline), key=lambda chunk: chunks[chunk])
    for giver, taker in product(givers[:MOST_TRIED], takers[:MOST_TRIED]):
        moved = list(sizes)
        moved[giver], moved[taker] = sizes[giver] - 1, sizes[taker] + 1
        changed = candidate.changed(parallel={"layers_per_chunk": tuple(moved)})
        if not check_phases(changed.phases, changed.world_size, gpu=True):
            yield changed


def _chunk_seconds(candidate: Candidate) -> list[float]:
    """Of the whole run, in each of the model's chunks, the teachers' passes left out where they come before."""
    pipeline = candidate.parallel.pipeline
    seconds = [0.0] * candidate.parallel.num_chunks
    for plan in candidate.plans:
        steps = plan.phase.recipe.training.steps
        for stage, passes in enumerate(plan.timeline):
            for each in passes:
                seconds[each.what.chunk * pipeline + stage] += steps * (each.end - each.start)
    return seconds
