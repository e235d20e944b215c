"""A step needs as many bytes as the one before it: nothing of a step stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize
from tests.objectives.examples import all_kinds
from tests.planning.live_tensors import LiveTensors
from tests.training.workspace import build_run, make_workspace


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    yield initialize(Parallel(), seed=1)
    destroy()


def test_live_tensors_are_as_many_in_every_step(groups: ProcessGroupCollection, tmp_path: Path) -> None:
    """With every kind of objective. The first step makes the optimizer's state."""
    run = build_run(make_workspace(tmp_path, objectives=all_kinds(4)), groups)
    peaks, left = [], []
    with LiveTensors() as live:
        live.mark((p for chunk in run.chunks for p in chunk.parameters()), "weights")
        for step in range(1, 5):
            live.reset()
            run.train_step(run.data.step(step, 0, 1))
            peaks.append(live.peak)
            left.append(live.total)
    assert peaks[1] == peaks[2] == peaks[3]
    assert left[1] == left[2] == left[3]
