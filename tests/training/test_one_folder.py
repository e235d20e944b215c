"""One run, one folder: no old result passes for a new one, and no second run gets in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longred_megatron.checkpoint.distributed import read_description
from longred_megatron.errors import UserError
from longred_megatron.parallel.world import world
from longred_megatron.recipe import dump_recipe, load_recipe
from longred_megatron.train import main
from longred_megatron.training.run_folder import check_run_folder, checkpoint_path
from longred_megatron.training.run_lock import LOCK, RunLock
from tests.training.workspace import make_workspace, read_metrics
from tools.convert_checkpoint import main as convert

HOLD = "import sys, time; from pathlib import Path; from longred_megatron.training.run_lock import RunLock\n"
HOLD += "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def record(run: Path) -> dict[str, object]:
    values = json.loads((run / "hf" / "longred_megatron.json").read_text())
    assert values.pop("bytes") == {"model.safetensors": (run / "hf" / "model.safetensors").stat().st_size}
    return values


def test_the_model_is_of_the_last_step_also_after_a_stop(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    main([str(recipe), "training.steps=1"])
    assert record(run) == {"step": 1, "checkpoint": read_description(checkpoint_path(run, 1)).digest}
    with monkeypatch.context() as patched:  # the signal comes during step 2
        patched.setattr("longred_megatron.training.signals.StopRequest.agreed", lambda _: signal.SIGTERM)
        with pytest.raises(SystemExit):
            main([str(recipe), "training.steps=2"])
    assert record(run)["step"] == 1
    main([str(recipe), "training.steps=2"])
    assert record(run) == {"step": 2, "checkpoint": read_description(checkpoint_path(run, 2)).digest}
    assert json.loads((run / "hf-step-000001" / "longred_megatron.json").read_text())["step"] == 1
    capfd.readouterr()
    main([str(recipe), "training.steps=2"])
    assert "all 2 steps are done" in capfd.readouterr().out


def test_an_export_of_something_else_is_kept_aside(recipe: Path, tmp_path: Path) -> None:
    main([str(recipe), "training.steps=1"])
    expected = record(tmp_path / "run")
    for aside in ("hf-earlier", "hf-earlier-2", "hf-earlier-3"):
        if aside == "hf-earlier-3":
            (tmp_path / "run" / "hf" / "model.safetensors").unlink()
        else:
            (tmp_path / "run" / "hf" / "longred_megatron.json").write_text("[]")
        main([str(recipe), "training.steps=1"])
        assert record(tmp_path / "run") == expected and (tmp_path / "run" / aside / "config.json").exists()


def test_fewer_steps_than_are_done_says_what_is_there(recipe: Path, tmp_path: Path) -> None:
    stored = load_recipe(recipe)
    checkpoint_path(stored.run.dir, 5).mkdir(parents=True)
    (stored.run.dir / "metrics.jsonl").touch()
    (stored.run.dir / "recipe.yaml").write_text(dump_recipe(stored))
    with pytest.raises(UserError, match=r"has done 5 steps, more than the 3 of training\.steps.*step-000005.*run/hf"):
        check_run_folder(load_recipe(recipe, ["training.steps=3"]))
    check_run_folder(load_recipe(recipe, ["training.steps=5"]))


def test_a_second_run_is_told_who_is_there(recipe: Path, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .* since \d{{4}}-.* UTC; wait"):
        main([str(recipe)])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    holder.kill()  # -9: the file stays, the lock does not
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_bytes())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists()


def test_a_stopped_owner_is_not_gone(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    old = time.time() - 10**6
    os.utime(tmp_path / "run" / LOCK, (old, old))
    with pytest.raises(UserError, match="in use by process"), RunLock(tmp_path / "run"):
        pass


def test_what_the_lock_says_may_be_damaged(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / "run" / LOCK).write_text("[1]")
    with pytest.raises(UserError, match="in use by another run"), RunLock(tmp_path / "run"):
        pass


def test_a_moved_run_goes_on_with_its_recipe_beside_it(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for name in ("model", "teacher", "texts.bin", "texts.idx", recipe.name):
        shutil.move(tmp_path / name, tmp_path / "here" / name)
    main([str(tmp_path / "here" / recipe.name), "training.steps=1"])
    there = shutil.move(tmp_path / "here", tmp_path / "there")
    convert(["megatron-to-hf", "--checkpoint", f"{there}/run/checkpoints/step-000001", "--output", f"{there}/back"])
    main([str(there / recipe.name), "training.steps=2"])
    assert [line["step"] for line in read_metrics(there / "run")] == [1, 2]
    shutil.copytree(there / "model", tmp_path / "another")
    with pytest.raises(UserError, match=r"model\.hf was .*there/model'.*, is .*another'"):
        main([str(there / recipe.name), "training.steps=3", f"model.hf={tmp_path}/another"])


DAMAGES = {
    "metrics.jsonl": b'{"step": 1, "loss"\n\xff\xfe\n[]\n{"step": "one"}\n',
    "ranks/rank-00000.json": b"{",
    "tensorboard/events.out.tfevents.1.x": b"damaged",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_of_a_run_are_no_obstacle(
    recipe: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    main([str(recipe), "training.steps=1"])
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_bytes(DAMAGES[name])
    main([str(recipe), "training.steps=2"])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2
    if name == "metrics.jsonl":
        assert (tmp_path / "run" / "damaged-metrics.jsonl").read_bytes() == DAMAGES[name]
        assert "4 lines are damaged and left out" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "ranks", "checkpoints", "hf"])
def test_files_where_folders_should_be_are_named(recipe: Path, name: str) -> None:
    stored = load_recipe(recipe)
    stored.run.dir.mkdir()
    (stored.run.dir / "recipe.yaml").write_text(dump_recipe(stored))
    if name == "metrics.jsonl":
        (stored.run.dir / name).mkdir()
    else:
        (stored.run.dir / "metrics.jsonl").touch()
        (stored.run.dir / name).touch()
    with pytest.raises(UserError, match=rf"run\.dir: .*/run/{name}: a folder where a file should be"):
        check_run_folder(stored)


def test_a_folder_with_a_recipe_is_no_run_folder_for_that(recipe: Path, tmp_path: Path) -> None:
    before = recipe.read_text()
    with pytest.raises(UserError, match="is the folder of the recipe itself"):
        main([str(recipe), f"run.dir={tmp_path}"])
    stored = load_recipe(recipe)
    stored.run.dir.mkdir()
    for name in ("recipe.yaml", "thesis.txt"):
        shutil.copy(recipe, stored.run.dir / name)
    with pytest.raises(UserError, match="not empty and not a run folder"):
        check_run_folder(stored)
    assert recipe.read_text() == before


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
WORLDS = (
    ({"WORLD_SIZE": "abc"}, r"WORLD_SIZE='abc', no RANK, no MASTER_ADDR, no MASTER_PORT"),
    ({"RANK": "0"}, "no WORLD_SIZE, no MASTER_ADDR"),
    ({"WORLD_SIZE": "8"}, "no RANK"),
    (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
    (TORCHRUN | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
    (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="),
)


@pytest.mark.parametrize(("environment", "message"), WORLDS)
def test_an_environment_that_torchrun_did_not_make_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        world(environment)


def test_worlds_are_torchruns_or_one_process() -> None:
    assert world(TORCHRUN) == (1, 2)
    assert world({}) == world({"WORLD_SIZE": "1"}) == (0, 1)
