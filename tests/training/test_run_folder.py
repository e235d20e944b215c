from pathlib import Path

import pytest

from longred_megatron.errors import UserError
from longred_megatron.recipe import dump_recipe, load_recipe
from longred_megatron.training.run_folder import (
    check_run_folder,
    checkpoint_path,
    checkpoints,
    prune_checkpoints,
)
from tests.training.workspace import make_workspace


def test_a_run_may_go_further_and_on_another_layout_but_not_change_its_method(tmp_path: Path) -> None:
    path = make_workspace(tmp_path)
    recipe = load_recipe(path)
    recipe.run.dir.mkdir()
    (recipe.run.dir / "recipe.yaml").write_text(dump_recipe(recipe))
    check_run_folder(recipe)
    check_run_folder(load_recipe(path, ["training.steps=60", "parallel.tensor=2", "training.recompute=full"]))
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.001, is 0\.5"):
        check_run_folder(load_recipe(path, ["optimizer.lr=0.5"]))
    with pytest.raises(UserError, match="belongs to another recipe"):
        check_run_folder(load_recipe(path, ["objectives.short_to_long=null"]))


def test_checkpoints_are_found_in_order_and_pruned_from_the_oldest(tmp_path: Path) -> None:
    for step in (5, 1000000, 40):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000041.partial").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 40, 1000000]
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000040", "step-1000000"]
