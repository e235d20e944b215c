"""What the ranks write of a checkpoint: each its share, also of weights that several of them hold."""

from pathlib import Path

import pytest
import torch

from longred_megatron.planning.saving import checkpoint_bytes
from longred_megatron.recipe import load_recipe, read_phases
from tests.layouts.ranks import Case, run_all
from tests.layouts.table import CHANGES, MODELS, SIZES
from tests.layouts.test_resharding import saved_tensors
from tests.training.workspace import make_workspace

LAYOUTS = {
    "data 2": (2, ()),
    "data 4": (4, ()),
    "context 2, data 2": (4, ("parallel.context=2",)),
    "tensor 2, data 2": (4, ("parallel.tensor=2",)),
    "pipeline 2, data 2": (4, ("parallel.pipeline=2",)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, of one rank, and the same saved again by every layout that has loaded it."""
    folder = tmp_path_factory.mktemp("shares")
    recipe = make_workspace(folder / "workspace", MODELS["untied"], SIZES, **CHANGES)
    run_all([Case("one", 1, recipe, steps=range(1, 2), save=folder / "one-saved")], folder)
    cases = [
        Case(name, world, recipe, own, steps=range(2, 3), save=folder / f"{name}-saved", resume=folder / "one-saved")
        for name, (world, own) in LAYOUTS.items()
    ]
    run_all(cases, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_write_alike_much_and_what_one_rank_writes(layout: str, saved: Path) -> None:
    world, _ = LAYOUTS[layout]
    sizes = [(saved / f"{layout}-saved" / f"__{rank}_0.distcp").stat().st_size for rank in range(world)]
    print(f"{layout}: {sizes} bytes")
    assert max(sizes) < 1.15 * sum(sizes) / world
    [phase] = read_phases(load_recipe(saved / "workspace" / "recipe.yaml", LAYOUTS[layout][1]))
    # The arithmetic knows no file format, of whose headers tiny tensors have as much as numbers.
    numbers = sum(tensor.nbytes for tensor in saved_tensors(saved / f"{layout}-saved").values())
    largest_share = max(sizes) / sum(sizes) * numbers
    assert checkpoint_bytes(phase, world) == pytest.approx(largest_share, rel=0.15)
    one, again = saved_tensors(saved / "one-saved"), saved_tensors(saved / f"{layout}-saved")
    assert one.keys() == again.keys()
    for name, tensor in one.items():
        rows = min(len(tensor), len(again[name]))  # layouts pad the vocabulary to different sizes
        assert torch.equal(tensor[:rows], again[name][:rows]), name
