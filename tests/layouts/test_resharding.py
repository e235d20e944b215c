"""A checkpoint saved in one layout goes on in any other as if nothing had happened."""

from pathlib import Path

import pytest

from tests.layouts.ranks import Case, run_all
from tests.layouts.table import CHANGES, MODELS, SIZES
from tests.training.workspace import make_workspace

TOLERANCE = 1e-5
SAVED = {"untied": ("parallel.tensor=2", "parallel.pipeline=2"), "tied": ("parallel.pipeline=2",)}  # tied: and data 2
LOADED = {
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "interleaved": (4, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "uneven, tensor 2": (4, ("parallel.pipeline=2", "parallel.layers_per_stage=[3,5]", "parallel.tensor=2")),
    "context 2, data 2": (4, ("parallel.context=2",)),
    "data 2": (2, ()),
    "one": (1, ()),
}


@pytest.mark.parametrize("model", SAVED)
def test_going_on_in_another_layout_equals_going_on_in_the_same(model: str, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path / "workspace", MODELS[model], SIZES, **CHANGES)
    checkpoint = tmp_path / "checkpoint"
    whole = Case("whole", 4, recipe, SAVED[model], steps=range(1, 4), save=checkpoint)
    outcomes = dict(run_all([whole], tmp_path))
    resumed = [
        Case(name.replace(" ", "-"), world, recipe, overrides, steps=range(2, 4), resume=checkpoint)
        for name, (world, overrides) in LOADED.items()
    ]
    outcomes |= run_all(resumed, tmp_path)
    for case in resumed:
        differences = outcomes[case.name].difference(outcomes["whole"].last(2))
        assert max(differences.values()) < TOLERANCE, (case.name, differences)
