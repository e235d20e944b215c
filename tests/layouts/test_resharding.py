"""A checkpoint saved in one layout goes on in any other as if nothing had happened."""

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.layouts.ranks import Case, run_all
from tests.layouts.table import CHANGES, MODELS, SIZES
from tests.training.workspace import make_workspace

TOLERANCE = 1e-5
SAVED = {  # model and overrides, on four ranks
    "tensor 2, pipeline 2": ("untied", ("parallel.tensor=2", "parallel.pipeline=2")),
    "tensor 2, data 2": ("biases", ("parallel.tensor=2",)),
    "pipeline 2, data 2": ("tied", ("parallel.pipeline=2",)),
}
LOADED = {
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "interleaved": (4, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "uneven, tensor 2": (4, ("parallel.pipeline=2", "parallel.layers_per_chunk=[3,5]", "parallel.tensor=2")),
    "context 2, data 2": (4, ("parallel.context=2",)),
    "data 2": (2, ()),
    "one": (1, ()),
}


@pytest.mark.parametrize("saved", SAVED)
def test_going_on_in_another_layout_equals_going_on_in_the_same(saved: str, tmp_path: Path) -> None:
    model, overrides = SAVED[saved]
    recipe = make_workspace(tmp_path / "workspace", MODELS[model], SIZES, **CHANGES)
    checkpoint = tmp_path / "checkpoint"
    whole = Case("whole", 4, recipe, overrides, steps=range(1, 4), save=checkpoint)
    outcomes = dict(run_all([whole], tmp_path))
    resumed = [
        Case(name, world, recipe, own, steps=range(2, 4), save=tmp_path / f"{name}-again", resume=checkpoint)
        for name, (world, own) in LOADED.items()
    ]
    outcomes |= run_all(resumed, tmp_path)
    state = saved_tensors(checkpoint)
    assert {name.removeprefix("optimizer.state.").split(".")[0] for name in state} >= {"param", "exp_avg", "exp_avg_sq"}
    for case in resumed:
        differences = outcomes[case.name].difference(outcomes["whole"].last(2))
        assert max(differences.values()) < TOLERANCE, (case.name, differences)
        assert case.save
        again = saved_tensors(case.save)
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            rows = min(len(tensor), len(again[name]))  # layouts pad the vocabulary to different sizes
            assert torch.equal(tensor[:rows], again[name][:rows]), (case.name, name)


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint."""
    reader = dcp.FileSystemReader(checkpoint)
    found = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
