"""`training.async_save`: checkpoints are written beside the steps that follow."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.checkpoint import tensor_files
from longred_megatron.checkpoint.distributed import Saving
from longred_megatron.errors import UserError
from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.training.saver import CheckpointSaver
from longred_megatron.training.watchdog import Watchdog
from tests.layouts.test_resharding import saved_tensors
from tests.training.test_run import assert_bitwise_equal, exported
from tests.training.workspace import build_run, make_workspace, read_metrics, without_times

EVERY_2 = ("training.checkpoint_every_steps=2", "training.keep_checkpoints=9")
# The training command with a disk of its own kind: `before` runs in the thread that writes, before it does. It prints
# how long the training waits for checkpoints.
TRAIN = """
import sys, time
from pathlib import Path
from longred_megatron import train
from longred_megatron.checkpoint import tensor_files
from longred_megatron.errors import run_cli
from longred_megatron.training.saver import CheckpointSaver
from longred_megatron.training.step import TrainStep
write = tensor_files.Writing.write
def slow(self):
    {before}
    return write(self)
tensor_files.Writing.write = slow
def timed(method):
    def wrapped(*arguments, **settings):
        started = time.perf_counter()
        method(*arguments, **settings)
        print(f"waited {{time.perf_counter() - started:.3f}}")
    return wrapped
CheckpointSaver.save, CheckpointSaver.after_step = timed(CheckpointSaver.save), timed(CheckpointSaver.after_step)
step = TrainStep.__call__
TrainStep.__call__ = lambda *arguments: (time.sleep({step_seconds}), step(*arguments))[1]
run_cli(train.main)
"""
# Nothing is written before the training has come to the step after the next save would have been due.
WAITS_FOR_STEP = """
    metrics, end = Path(self._writer.path).parents[1] / "metrics.jsonl", time.monotonic() + 60
    step = int(Path(self._writer.path).name[5:11])
    while step < 6 and len(metrics.read_text().splitlines()) < step + 1:
        assert time.monotonic() < end, "no step was trained while this one was waited for"
        time.sleep(0.01)
"""


def start(
    recipe: Path, *overrides: str, before: str = "pass", is_async: bool = True, step_seconds: float = 0
) -> subprocess.Popen[str]:
    script = TRAIN.format(before=before, step_seconds=step_seconds)
    command = [sys.executable, "-c", script, str(recipe), *overrides, f"training.async_save={str(is_async).lower()}"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(recipe: Path, *overrides: str, before: str = "pass", is_async: bool = True, step_seconds: float = 0) -> str:
    process = start(recipe, *overrides, before=before, is_async=is_async, step_seconds=step_seconds)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and its run that waited for every checkpoint."""
    folder = tmp_path_factory.mktemp("calm")
    recipe = make_workspace(folder, precision={"params": "bf16"})
    train(recipe, *EVERY_2, is_async=False)
    return recipe, folder / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_holds_the_step_and_not_what_was_trained_since(calm: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, expected = calm
    out = train(recipe, *EVERY_2, f"run.dir={tmp_path}/run", before=WAITS_FOR_STEP)
    assert re.search(r"checkpoint copy .*GiB a rank of the machine's memory", out)
    assert names(tmp_path / "run") == names(expected) == ["step-000002", "step-000004", "step-000006"]
    for name in names(expected):
        assert_bitwise_equal(
            saved_tensors(tmp_path / "run/checkpoints" / name), saved_tensors(expected / "checkpoints" / name)
        )
    # Going on from one that a thread wrote.
    for gone in ("checkpoints/step-000004", "checkpoints/step-000006", "hf"):
        shutil.rmtree(tmp_path / "run" / gone)
    assert "resuming after step 2" in train(recipe, f"run.dir={tmp_path}/run")
    assert_bitwise_equal(exported(tmp_path / "run"), exported(expected))
    assert without_times(read_metrics(tmp_path / "run")) == without_times(read_metrics(expected))


def test_killed_while_it_writes_the_one_before_is_used(calm: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, expected = calm
    run = tmp_path / "run"
    hangs = "if self._writer.path.name.startswith('step-000004'): write(self), time.sleep(1000)"
    process = start(recipe, *EVERY_2, f"run.dir={run}", before=hangs)
    wait(lambda: list((run / "checkpoints").glob("step-000004.partial/__0_0.distcp")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert names(run) == ["step-000002", "step-000004.partial"]
    assert "resuming after step 2" in train(recipe, *EVERY_2, f"run.dir={run}")
    assert names(run) == names(expected)
    assert_bitwise_equal(exported(run), exported(expected))


def test_sigterm_waits_for_it_and_saves_once_more(calm: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = calm
    run = tmp_path / "run"
    overrides = ("training.steps=100000", "training.checkpoint_every_steps=3", f"run.dir={run}")
    process = start(recipe, *overrides, before="time.sleep(2)")
    wait((run / "checkpoints" / "step-000003.partial").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert names(run) == sorted({"step-000003", f"step-{len(read_metrics(run)):06}"})


def test_a_loss_that_is_not_finite_waits_for_it_and_names_it(calm: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = calm
    run = tmp_path / "run"
    overrides = ("optimizer.lr=1.0e+20", "optimizer.clip_grad=0", "training.checkpoint_every_steps=1", f"run.dir={run}")
    process = start(recipe, *overrides, before="time.sleep(2)")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and f"the last good checkpoint is {run}/checkpoints/{names(run)[-1]}" in err
    assert "partial" not in err


def test_training_goes_on_while_a_slow_disk_writes(calm: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = calm
    waited = {}
    for is_async in (False, True):
        overrides = ("training.steps=4", "training.checkpoint_every_steps=2", f"run.dir={tmp_path}/{is_async}")
        out = train(recipe, *overrides, before="time.sleep(2)", is_async=is_async, step_seconds=3)
        waited[is_async] = sum(float(seconds) for seconds in re.findall(r"waited (\S+)", out))
    print(f"two checkpoints on a disk of 2 s: {waited[False]:.2f} s waited, {waited[True]:.2f} s when asynchronous")
    assert waited[False] > 4  # for each
    assert waited[True] < 3  # for the last alone


def test_a_run_that_fails_removes_it(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(make_workspace(tmp_path), groups, "training.async_save=true")
    go_on, write = threading.Event(), tensor_files.Writing.write
    monkeypatch.setattr(tensor_files.Writing, "write", lambda self: go_on.wait(60) and write(self))
    saver = CheckpointSaver(run.phase.recipe, Watchdog(tmp_path / "ranks", 0, 1, 60))
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(1, run.chunks, run.student, run.optimizer)
        saver.after_step()
        assert names(tmp_path / "run") == ["step-000001.partial"]
        raise ZeroDivisionError
    go_on.set()
    assert names(tmp_path / "run") == []


def _one_rank_has_a_full_disk(join: Callable[[str], None], recipe: Path, folder: Path) -> None:
    join("world")
    groups = initialize(Parallel(), seed=1)
    run, rank = build_run(recipe, groups), torch.distributed.get_rank()
    if rank == 1:

        def full(self: tensor_files.Writing) -> None:
            raise OSError(28, "No space left on device")

        tensor_files.Writing.write = full  # type: ignore[assignment, method-assign]
    saving = Saving(folder / "checkpoint", run.chunks, {}, run.optimizer, in_background=True)
    while not saving.is_written():
        time.sleep(0.01)
    try:
        saving.finish()
    except UserError as error:
        (folder / f"message-{rank}").write_text(str(error))
    destroy()


def test_a_full_disk_of_one_rank_is_told_on_all(tmp_path: Path) -> None:
    run_ranks(_one_rank_has_a_full_disk, 2, make_workspace(tmp_path / "workspace"), tmp_path)
    first, second = ((tmp_path / f"message-{rank}").read_text() for rank in (0, 1))
    assert first == second and "could not be written (rank 1: the disk is full)" in first
    assert not list(tmp_path.glob("checkpoint*"))
