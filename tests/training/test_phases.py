"""Runs in phases, through the command line: numbers, borders, stops and what is exported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from longred_megatron.errors import UserError
from longred_megatron.recipe import dump_recipe, load_recipe
from longred_megatron.training.run_folder import check_run_folder
from tests.checkpoint.small_models import SIZES
from tests.training.test_run import assert_bitwise_equal, exported, train
from tests.training.workspace import TARGET, make_workspace, read_metrics, without_times

FIRST = {
    "model": {"rope": {"method": "abf", "theta": 7e5}, "max_position_embeddings": TARGET // 2},
    "objectives": {"short_restoration": None, "long_text": {"sequence_length": TARGET // 2}},
    "optimizer": {"lr": 5e-4, "betas": [0.8, 0.9], "warmup_steps": 2},
    "training": {"steps": 2},
}
SECOND = {
    "model": {"rope": {"theta": 3e6}},  # neither the first's nor the recipe's
    "objectives": {"short_to_long": None, "long_text": {"microbatches": 4, "data": "more"}},
    "data": {"more": {"more": 1.0}},
    "training": {"steps": 2, "recompute": "full"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, [FIRST, SECOND])


def write_recipe(folder: Path, phases: list[dict[str, Any]]) -> Path:
    optimizer = {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-6}
    path = make_workspace(folder, optimizer=optimizer)
    values = yaml.safe_load(path.read_text()) | {"phases": phases}
    path.write_text(yaml.safe_dump(values))
    builder = IndexedDatasetBuilder(f"{folder / 'more'}.bin", dtype=np.uint16)
    generator = np.random.default_rng(5)
    for _ in range(10):
        builder.add_document(generator.integers(0, SIZES["vocab_size"], size=300), [300])
    builder.finalize(f"{folder / 'more'}.idx")
    return path


# Ends the run after the step in argv[1], as a signal would.
STOPPED = """
import signal, sys
from longred_megatron import train
from longred_megatron.training.metrics import MetricsWriter
write = MetricsWriter.write
def write_and_signal(writer, metrics):
    write(writer, metrics)
    if metrics["step"] == int(sys.argv[1]):
        signal.raise_signal(signal.SIGTERM)
MetricsWriter.write = write_and_signal
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_stopped_in_a_phase_or_between_two_goes_on_bit_for_bit(step: int, recipe: Path, tmp_path: Path) -> None:
    train(recipe, f"run.dir={tmp_path}/whole")
    command = [sys.executable, "-c", STOPPED, str(step), str(recipe), f"run.dir={tmp_path}/parts"]
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert stopped.returncode == 128 + 15, stopped.stderr
    assert (tmp_path / "parts" / "checkpoints" / f"step-{step:06}").exists()
    assert not (tmp_path / "parts" / "hf").exists()
    out = train(recipe, f"run.dir={tmp_path}/parts")
    assert f"resuming after step {step}" in out
    assert ("step 2/4" in out) == (step < 2)  # a phase that is over is not trained again
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert without_times(whole) == without_times(parts)
    assert_bitwise_equal(exported(tmp_path / "whole"), exported(tmp_path / "parts"))


def test_what_a_run_of_two_phases_leaves_behind(recipe: Path, tmp_path: Path) -> None:
    out = train(recipe)
    assert "step 2/4 (phase 1/2)" in out and "step 3/4 (phase 2/2)" in out
    metrics = read_metrics(tmp_path / "run")
    assert [(line["step"], line["phase"]) for line in metrics] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [line["lr"] for line in metrics] == pytest.approx([2.5e-4, 5e-4, 5e-4, 1e-3])  # each warms up
    assert [line["tokens"] for line in metrics] == [n * TARGET for n in (4, 8, 14, 20)]
    assert ["loss/short_to_long" in line for line in metrics] == [True, True, False, False]
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000002", "step-000004"]
    described = [json.loads((path / "checkpoint.json").read_text())["architecture"] for path in checkpoints]
    assert [d["rope"]["rope_theta"] for d in described] == [7e5, 3e6]
    assert [d["max_position_embeddings"] for d in described] == [TARGET // 2, TARGET]
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == TARGET and config["rope_parameters"]["rope_theta"] == 3e6
    for folder in (checkpoints[0], tmp_path / "run" / "hf", tmp_path / "run"):
        assert load_recipe(folder / "recipe.yaml") == load_recipe(recipe)


def test_the_second_phase_begins_with_the_weights_of_the_first_and_its_own_rope_and_data(
    recipe: Path, tmp_path: Path
) -> None:
    train(recipe)
    # Up to here the first phase alone, exported; then a plain run from that model, with the second's settings.
    first = write_recipe(tmp_path, [FIRST])
    train(first, f"run.dir={tmp_path}/first")
    second = write_recipe(tmp_path, [SECOND])
    # One step of the same data further on, which a plain run begins with: step 3 of the run.
    script = """
import sys
from longred_megatron import train
from longred_megatron.training.microbatches import MicroBatchSource
step = MicroBatchSource.step
MicroBatchSource.step = lambda source, number, *ranks: step(source, number + 2, *ranks)
train.main(sys.argv[1:])
"""
    window = f"{{hf: {tmp_path}/first/hf, rope: {{method: abf, theta: 1e6}}, max_position_embeddings: {TARGET}}}"
    overrides = [f"model={window}", "phases.0.training.steps=1", "optimizer.warmup_steps=1"]
    command = [sys.executable, "-c", script, str(second), *overrides, f"run.dir={tmp_path}/second"]
    subprocess.run(command, check=True, timeout=300)
    [plain] = read_metrics(tmp_path / "second")
    third = read_metrics(tmp_path / "run")[2]
    for name in (n for n in plain if n.startswith("loss") or n == "grad_norm"):
        assert third[name] == plain[name], name


def test_adams_settings_are_those_of_the_phase_and_the_former_model_is_freed(recipe: Path) -> None:
    script = """
import sys
from longred_megatron import train
from longred_megatron.training import run as runs
used, freed, one_step, build = [], [], runs._one_step, runs.build
def spy(run, *rest):
    metrics = one_step(run, *rest)
    used.append([(tuple(g["betas"]), g["eps"]) for g in run.optimizer.param_groups][0])
    return metrics
import weakref
def built(*args):
    freed.extend(p() is None for p in alive)
    run = build(*args)
    teachers = (chunk for chunks in run.train_step.teachers.models.values() for chunk in chunks)
    alive.extend(weakref.ref(p) for chunk in (*run.chunks, *teachers) for p in chunk.parameters())
    return run
alive = []
runs._one_step, runs.build = spy, built
train.main(sys.argv[1:])
assert used == [((0.8, 0.9), 1e-6)] * 2 + [((0.9, 0.95), 1e-6)] * 2, used
assert freed and all(freed)  # models of the first phase, when the second's were built
"""
    subprocess.run([sys.executable, "-c", script, str(recipe)], check=True, timeout=300)


def test_a_prolonged_last_phase_keeps_the_earlier_export(recipe: Path, tmp_path: Path) -> None:
    train(recipe)
    train(recipe, "phases.1.training.steps=3")
    assert (tmp_path / "run" / "hf-step-000004" / "config.json").exists()
    assert len(read_metrics(tmp_path / "run")) == 5
    assert "all 5 steps are done" in train(recipe, "phases.1.training.steps=3")


def test_only_the_last_phase_may_change_its_length(recipe: Path) -> None:
    stored = load_recipe(recipe)
    stored.run.dir.mkdir()
    (stored.run.dir / "recipe.yaml").write_text(dump_recipe(stored))
    for free in ("phases.1.training.steps=9", "phases.0.training.recompute=full", "parallel.tensor=2"):
        check_run_folder(load_recipe(recipe, [free]))
    for fixed, message in {
        "phases.0.training.steps=3": r"phases\[0\]\.training\.steps was 2, is 3",
        "training.steps=7": r"training\.steps was 6, is 7",  # the length of phases that name none
        "phases.1.model.rope.theta=2e6": r"phases\[1\]\.model\.rope\.theta was 3000000\.0, is 2000000",
        "phases.1.objectives.short_restoration=null": r"objectives\.short_restoration was None, is 'null'",
        "phases=[{}]": "phases was 2, is 1",
        "phases=null": "phases was 2, is None",
    }.items():
        with pytest.raises(UserError, match=message):
            check_run_folder(load_recipe(recipe, [fixed]))


def test_problems_of_every_phase_come_before_anything_starts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [FIRST, SECOND | {"data": {"more": {"nowhere": 1.0}}}])
    command = [sys.executable, "-m", "longred_megatron.train", str(recipe)]
    missing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert missing.returncode == 2 and "nowhere" in missing.stderr
    assert "Traceback" not in missing.stderr and not (tmp_path / "run").exists()
    wrong = [*command, f"phases.1.objectives.long_text.sequence_length={2 * TARGET}", "phases.0.optimizer.min_lr=1"]
    checked = subprocess.run(wrong, capture_output=True, text=True, timeout=300, check=False)
    assert checked.returncode == 2 and not (tmp_path / "run").exists()
    assert f"phases[1]: `objectives.long_text.sequence_length` is {2 * TARGET}" in checked.stderr
    assert "phases[0]: `optimizer.min_lr` is 1" in checked.stderr


def test_two_ranks_train_both_phases(recipe: Path, tmp_path: Path) -> None:
    train(recipe, f"run.dir={tmp_path}/one")
    train(recipe, f"run.dir={tmp_path}/two", "parallel.pipeline=2", ranks=2)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in (n for n in one if n.startswith("loss") or n == "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_recipe_is_rehearsed_with_its_phases(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longred_megatron.train", str(recipe), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/3 (phase 1/2)" in done.stdout and "step 3/3 (phase 2/2)" in done.stdout
    assert "resuming after step 3" in done.stdout and "step 4/4 (phase 2/2)" in done.stdout
    assert not (tmp_path / "run").exists()
