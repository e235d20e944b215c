"""Whole runs with a cache, and `tools/cache_targets.py`, by their command lines, in this process."""

import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from cache_targets import main as cache_targets
from longred_megatron.errors import UserError
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.planning.flops import step_flops
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.train import main as train_main
from longred_megatron.training import metrics
from longred_megatron.training.rehearsal import SIZES
from longred_megatron.training.small_copy import small_copy
from tests.training.workspace import build_run, make_workspace, read_metrics, without_times

STEPS = {"steps": 2, "recompute": "none", "checkpoint_every_steps": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run without a cache, `live`, and a cache that the tool has filled."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = make_workspace(folder, training=STEPS)
    train(recipe, f"run.dir={folder}/live")
    out = fill(recipe, f"teacher.cache={folder}/cache")
    assert "8 micro-batches: 8 computed, 0 were there" in out
    assert f"{folder}/cache: at most" in out
    return folder


def printed(command: Callable[[list[str]], None], *arguments: object) -> str:
    with redirect_stdout(StringIO()) as out:
        command([str(each) for each in arguments])
    return out.getvalue()


def fill(*arguments: object) -> str:
    return printed(cache_targets, *arguments)


def train(*arguments: object) -> str:
    return printed(train_main, *arguments)


def losses(run: Path) -> list[dict[str, Any]]:
    return without_times(read_metrics(run))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_run_reads_what_the_tool_kept_and_loads_no_teacher(folder: Path) -> None:
    train(folder / "recipe.yaml", f"run.dir={folder}/read", f"teacher.cache={folder}/cache")
    assert losses(folder / "read") == losses(folder / "live")
    recipe = folder / "recipe.yaml"
    groups = initialize(load_recipe(recipe).parallel, seed=1)
    try:
        assert not build_run(recipe, groups, f"teacher.cache={folder}/cache").train_step.teachers.models
    finally:
        destroy()


def test_utilization_counts_no_teacher_that_was_not_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda fp8: 1e9)

    def flops(name: str, *more: str) -> list[float]:
        train(folder / "recipe.yaml", f"run.dir={tmp_path}/{name}", *more)
        steps = read_metrics(tmp_path / name)
        return [step["model_flops_utilization"] * step["step_seconds"] * 1e9 for step in steps]

    shutil.copytree(folder / "cache", tmp_path / "cache")
    phase = read_phases(load_recipe(folder / "recipe.yaml", [f"teacher.cache={tmp_path}/cache"]))[0]
    all_asked, none_asked = step_flops(phase), step_flops(replace(phase, caches_are_full=True))
    assert none_asked < 0.9 * all_asked
    assert flops("live") == pytest.approx([all_asked] * 2)
    assert flops("filling", f"teacher.cache={tmp_path}/new") == pytest.approx([all_asked] * 2)
    assert flops("reading", f"teacher.cache={tmp_path}/cache") == pytest.approx([none_asked] * 2)
    files(tmp_path / "cache")[3].unlink()
    first, second = flops("mending", f"teacher.cache={tmp_path}/cache")
    assert sorted([first, second])[0] == pytest.approx(none_asked) and none_asked < max(first, second) < all_asked


def test_a_damaged_file_is_computed_again_and_mended(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    damaged = files(tmp_path / "cache")[3]
    damaged.write_bytes((whole := damaged.read_bytes())[:-1] + bytes([whole[-1] ^ 1]))
    files(tmp_path / "cache")[5].unlink()
    train(folder / "recipe.yaml", f"run.dir={tmp_path}/run", f"teacher.cache={tmp_path}/cache")
    assert losses(tmp_path / "run") == losses(folder / "live")
    assert "8 micro-batches: 0 computed, 8 were there" in fill(
        folder / "recipe.yaml", f"teacher.cache={tmp_path}/cache"
    )


def test_other_steps_and_layers_read_what_is_there(folder: Path, tmp_path: Path) -> None:
    """With one more layer all short texts are asked again; of texts in another order those that are there are not."""
    shutil.copytree(folder / "cache", tmp_path / "cache")
    cache = f"teacher.cache={tmp_path}/cache"
    before = len(files(tmp_path / "cache"))
    assert "4 micro-batches: 0 computed, 4 were there" in fill(folder / "recipe.yaml", cache, "--steps", "2")
    out = fill(folder / "recipe.yaml", cache, "objectives.short_restoration.layers=[1, 2, 3]")
    assert "8 micro-batches: 4 computed, 4 were there" in out
    sequences = 2 * 2 * 256 // 16  # of short texts in two steps
    assert len(files(tmp_path / "cache")) == before + sequences


def test_fp8_says_its_error_and_filling_and_reading_agree(folder: Path, tmp_path: Path) -> None:
    recipe, settings = folder / "recipe.yaml", (f"teacher.cache={tmp_path}/cache", "teacher.cache_format=fp8")
    out = train(recipe, f"run.dir={tmp_path}/fills", *settings)
    assert "short_restoration: fp8 differs by " in out
    train(recipe, f"run.dir={tmp_path}/reads", *settings)
    assert losses(tmp_path / "fills") == losses(tmp_path / "reads") != losses(folder / "live")


def test_a_run_may_go_on_with_a_cache(folder: Path, tmp_path: Path) -> None:
    train(folder / "recipe.yaml", f"run.dir={tmp_path}/run", "training.steps=1")
    train(folder / "recipe.yaml", f"run.dir={tmp_path}/run", f"teacher.cache={folder}/cache")
    assert losses(tmp_path / "run") == losses(folder / "live")


def test_a_rehearsal_keeps_out_of_the_cache(folder: Path, tmp_path: Path) -> None:
    for overrides in ((), (f"teacher.cache={folder}/cache",)):
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        values, _ = small_copy(recipe, read_phases(recipe), tmp_path / str(len(overrides)), SIZES)
        cache = values["teacher"]["cache"]
        assert cache is None if not overrides else Path(cache).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no objective has a teacher with a cache; set teacher.cache=FOLDER"),
        (("teacher.cache=runs/x", "--steps", "2-3"), "--steps 2-3: the run has the steps 1-2"),
        (("teacher.cache=runs/x", "--steps", "2-1"), "--steps 2-1: the run has the steps 1-2"),
        (("teacher.cache=runs/x", "--steps", "all"), "--steps 'all': must be two numbers"),
        (("teacher.cache_format=fp8",), "`teacher.cache_format` is 'fp8': has no effect without `teacher.cache`"),
        (
            ("teacher.cache=runs/x", "objectives.short_restoration=null", "objectives.short_to_long=null"),
            "has no effect, since no objective compares with that teacher",
        ),
        (("teacher.cache=/dev/null/x",), "cannot be written"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        fill(folder / "recipe.yaml", *arguments)
