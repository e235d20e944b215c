"""Fused Adam's state in checkpoints, over Transformer Engine and across machines."""

from tests.gpu_path import ranks

# isort: split

from pathlib import Path

from tests.layouts.ranks import Case
from tests.layouts.table import CHANGES, SIZES
from tests.training.workspace import make_workspace

TOLERANCE = 1e-5


def test_three_steps_and_three_are_six(tmp_path: Path) -> None:
    """In another layout: the first saves after its first step, the others go on from there."""
    recipe = make_workspace(tmp_path / "workspace", "llama_3", SIZES, **CHANGES)
    whole = Case("whole", 2, recipe, ("parallel.tensor=2",), steps=range(1, 5), save=tmp_path / "checkpoint")
    outcomes = dict(ranks.run_all([whole], tmp_path))
    resumed = [
        Case(name, world, recipe, overrides, steps=range(2, 5), resume=tmp_path / "checkpoint")
        for name, world, overrides in (("same", 2, whole.overrides), ("pipeline", 2, ("parallel.pipeline=2",)))
    ]
    outcomes |= ranks.run_all(resumed, tmp_path)
    for case in resumed:
        assert max(outcomes[case.name].difference(outcomes["whole"].last(3)).values()) < TOLERANCE, case.name
