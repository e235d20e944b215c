"""Orders of passes: written out by hand, and what any order must have."""

import pytest

from longred_megatron.planning.schedule import Pass, stage_passes
from longred_megatron.planning.simulation import simulate


def shown(passes: list[Pass]) -> str:
    return " ".join(f"{'B' if p.backward else 'F'}{p.microbatch}" + (f".{p.chunk}" if p.chunk else "") for p in passes)


def test_1f1b_by_hand() -> None:
    assert shown(stage_passes(0, 2, 1, 3)) == "F0 F1 B0 F2 B1 B2"
    assert shown(stage_passes(1, 2, 1, 3)) == "F0 B0 F1 B1 F2 B2"
    assert shown(stage_passes(0, 1, 1, 2)) == "F0 B0 F1 B1"


def test_interleaved_by_hand() -> None:
    assert shown(stage_passes(1, 2, 2, 2)) == "F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1"


@pytest.mark.parametrize("stages, chunks, microbatches", [(1, 1, 4), (4, 1, 2), (2, 2, 4), (4, 3, 8), (2, 4, 6)])
def test_every_pass_once_and_backward_after_forward(stages: int, chunks: int, microbatches: int) -> None:
    for stage in range(stages):
        passes = stage_passes(stage, stages, chunks, microbatches)
        assert len(passes) == len(set(passes)) == 2 * chunks * microbatches
        for each in passes:
            if each.backward:
                assert passes.index(each._replace(backward=False)) < passes.index(each)


@pytest.mark.parametrize("chunks", [1, 2])
def test_bubble_of_equal_passes(chunks: int) -> None:
    """(stages - 1) / (chunks x micro-batches) of the work, as in Megatron's papers."""
    timeline = simulate(4, chunks, 8, lambda stage, each: (2.0 if each.backward else 1.0) / chunks)
    work, end = 8 * 3.0, max(stage[-1].end for stage in timeline)
    assert end - work == pytest.approx(3 * 3.0 / chunks)


def test_messages_delay_the_next_stage() -> None:
    timeline = simulate(2, 1, 1, lambda stage, each: 1.0, message_seconds=0.5)
    assert [each.start for each in timeline[1]] == [1.5, 2.5]
    assert [(each.start, each.end) for each in timeline[0]] == [(0.0, 1.0), (4.0, 5.0)]
