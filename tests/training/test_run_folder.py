from pathlib import Path

import pytest

from longred_megatron.checkpoint.of_run import checkpoints
from longred_megatron.errors import UserError
from longred_megatron.recipe import dump_recipe, load_recipe
from longred_megatron.training.run_folder import (
    check_run_folder,
    checkpoint_path,
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


# What version 0.1.0 wrote for the workspace's recipe in a layout: objectives had no kinds, keys other names.
OLD = """\
model:
  hf: {folder}/model
  rope: {{method: abf, theta: 1000000.0}}
  max_position_embeddings: 256
teacher: {{hf: {folder}/teacher}}
step: {{tokens_per_microbatch: 256}}
objectives:
  long_text: {{microbatches: 2, sequence_length: 256, data: texts, weight: 1.0, context_parallel: null}}
  short_to_long: {{microbatches: 2, sequence_length: 64, data: texts, weight: 10.0, context_parallel: 1,
    positions: cream}}
  short_restoration:
    microbatches: 2
    sequence_length: 16
    data: texts
    weight: 5.0
    context_parallel: 2
    layers: [1, 3]
  packed_distillation: null
data:
  texts: {{{folder}/texts: 1.0}}
parallel:
  tensor: 1
  pipeline: 2
  virtual_pipeline: null
  layers_per_stage: [1, 3]
  context: 2
  sequence: false
precision: {{params: fp32, fp8: null, fp8_attention: false}}
optimizer:
  lr: 0.001
  schedule: constant
  warmup_steps: 0
  min_lr: 0.0
  weight_decay: 0.1
  betas: [0.9, 0.95]
  eps: 1.0e-08
  clip_grad: 1.0
training: {{steps: 6, seed: 2024, recompute: none, checkpoint_every_steps: 100, keep_checkpoints: 3,
  hang_minutes: 30.0}}
debug: {{dump_microbatches: null}}
run: {{dir: {folder}/run}}
phases: {phases}
"""
LAYOUT = "parallel={pipeline: 2, context: 2, layers_per_chunk: [1, 3]}"
WHOLE = "objectives.short_to_long.whole_sequences=true"


OLD_PHASES = "[{objectives: {long_text: {context_parallel: 1}}, training: {steps: 2}}, {training: {steps: 4}}]"


@pytest.mark.parametrize("phases", ["null", OLD_PHASES])
def test_a_run_of_the_version_before_goes_on(phases: str, tmp_path: Path) -> None:
    path = make_workspace(tmp_path)
    stored = tmp_path / "run" / "recipe.yaml"
    stored.parent.mkdir()
    stored.write_text(OLD.format(folder=tmp_path, phases=phases))
    own = "phases=" + phases.replace("context_parallel: 1", "whole_sequences: true")
    check_run_folder(load_recipe(stored))  # its own recipe, with the old names
    check_run_folder(load_recipe(path, [LAYOUT, WHOLE, own]))  # the same with the new ones
    check_run_folder(load_recipe(path, [WHOLE, own]))  # in another layout
    with pytest.raises(UserError, match=r"objectives\.short_to_long\.whole_sequences was True, is False"):
        check_run_folder(load_recipe(path, [LAYOUT, own]))
    changed = "objectives.long_text={kind: next_token, microbatches: 2, sequence_length: 256, data: texts, weight: 2}"
    with pytest.raises(UserError, match=r"objectives\.long_text\.weight was 1\.0, is 2"):
        check_run_folder(load_recipe(path, [LAYOUT, WHOLE, own, changed]))
    with pytest.raises(UserError, match=r"objectives\.short_restoration\.layers was \[1, 3\], is None"):
        check_run_folder(load_recipe(path, [LAYOUT, WHOLE, own, "objectives.short_restoration=null"]))
    assert [file.name for file in stored.parent.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("text", ["", "optimizer: {lr: 1.0}", "a: [", "objectives: {long_text: {made_up: 1}}"])
def test_a_stored_recipe_that_cannot_be_read_is_told_with_its_folder(text: str, tmp_path: Path) -> None:
    recipe = load_recipe(make_workspace(tmp_path))
    recipe.run.dir.mkdir()
    (recipe.run.dir / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        check_run_folder(recipe)
    [problem] = caught.value.problems
    assert problem.startswith(f"run.dir: {recipe.run.dir} belongs to another recipe")


def test_checkpoints_are_found_in_order_and_pruned_from_the_oldest(tmp_path: Path) -> None:
    for step in (5, 1000000, 40):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "checkpoint.json").touch()
    for name in ("step-3", "step-000004"):  # a user's
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-000006").touch()
    (tmp_path / "checkpoints" / "step-000041.partial").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 5, 40, 1000000]
    prune_checkpoints(tmp_path, keep=2)
    users = ["step-000004", "step-000006", "step-3"]
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == sorted([*users, "step-000040", "step-1000000"])
