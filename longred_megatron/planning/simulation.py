"""The passes of all stages in time: each waits for its stage and for the stage that sends to it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from longred_megatron.planning.schedule import Pass, stage_passes


class Timed(NamedTuple):
    """A pass with its start and end, in seconds from the first."""

    what: Pass
    start: float
    end: float


def simulate(
    num_stages: int,
    num_chunks: int,
    num_microbatches: int,
    seconds: Callable[[int, Pass], float],
    message_seconds: float = 0.0,
) -> list[list[Timed]]:
    """All passes of each stage, in order.

    seconds: of a pass on a stage. message_seconds: between the end of a pass and the start of the next stage's.
    """
    orders: Sequence[list[Pass]] = [
        stage_passes(s, num_stages, num_chunks, num_microbatches) for s in range(num_stages)
    ]
    done: list[list[Timed]] = [[] for _ in orders]
    ends: dict[tuple[int, int, bool], float] = {}  # by chunk of the model, micro-batch, backward
    last_chunk = num_stages * num_chunks - 1
    waiting = set(range(num_stages))
    while waiting:
        moved = False
        for stage in sorted(waiting):
            while len(done[stage]) < len(orders[stage]):
                each = orders[stage][len(done[stage])]
                chunk = each.chunk * num_stages + stage
                if each.backward:
                    before = (
                        (chunk + 1, each.microbatch, True) if chunk < last_chunk else (chunk, each.microbatch, False)
                    )
                else:
                    before = (chunk - 1, each.microbatch, False)
                if before[0] >= 0 and before not in ends:
                    break
                arrived = ends.get(before, 0.0) + (message_seconds if before[0] not in (-1, chunk) else 0.0)
                start = max(arrived, done[stage][-1].end if done[stage] else 0.0)
                end = start + seconds(stage, each)
                done[stage].append(Timed(each, start, end))
                ends[chunk, each.microbatch, each.backward] = end
                moved = True
            if len(done[stage]) == len(orders[stage]):
                waiting.discard(stage)
        assert moved or not waiting, "the schedule's stages wait for each other"
    return done
