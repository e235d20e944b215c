"""A rank that hangs ends the job, and is named."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from longred_megatron.training.watchdog import describe
from tests.training.workspace import make_workspace


def beat(rank: int, **changes: object) -> dict[str, object]:
    now = time.time()
    own = {"rank": rank, "host": "node0", "pid": 1, "time": now, "doing": "step 3", "place": 4, "since": now - 60}
    return own | {"failure": None} | changes


def test_a_silent_rank_is_named_before_one_that_waits() -> None:
    old = beat(1, time=time.time() - 50)
    assert describe([beat(0), old, beat(2)], interval=1).startswith("rank 1 (pid 1 on node0) is silent for 50 s")


def test_a_rank_behind_is_named() -> None:
    text = describe([beat(0), beat(1), beat(2, place=3, doing="step 2")], interval=1)
    assert text.startswith("rank 2 ") and "still at step 2" in text and "rank 0" not in text


def test_a_rank_that_failed_is_named_first() -> None:
    text = describe([beat(0, place=1), beat(1, failure="OutOfMemoryError: 80 GiB", time=0)], interval=1)
    assert text == "rank 1 (pid 1 on node0) is gone, it failed at step 3: OutOfMemoryError: 80 GiB"


# As NCCL does: leaving the world waits for collectives that the failed rank never joins.
FAILING = """
import os, sys, time, torch
from longred_megatron import train
from longred_megatron.errors import run_cli
from longred_megatron.training import run

def one_step(*arguments, real=run._one_step):
    if os.environ["RANK"] == "1":
        print("failing at", time.time(), flush=True)
        raise RuntimeError("a made-up failure")
    return real(*arguments)

def main():
    run._one_step = one_step
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: destroy(group) if group else time.sleep(3600)
    train.main(sys.argv[1:])

if __name__ == "__main__":
    run_cli(main)
"""


def test_a_rank_that_fails_ends_the_job_at_once_and_leaves_its_traceback(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"hang_minutes": 60.0})
    (tmp_path / "failing.py").write_text(FAILING)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(tmp_path / "failing.py"), str(recipe)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    ended = time.time()
    assert done.returncode != 0
    [failed] = re.findall(r"failing at ([\d.]+)", done.stdout)
    assert ended - float(failed) < 10  # 0.8 on a machine that does nothing else
    assert "unexpected error: RuntimeError: a made-up failure" in done.stderr
    reports = [path.read_text() for path in (tmp_path / "run").glob("unexpected-error-*.txt")]  # and the other rank's
    assert any('raise RuntimeError("a made-up failure")' in report for report in reports)
    beat = json.loads((tmp_path / "run" / "ranks" / "rank-00001.json").read_text())
    assert beat["failure"] == "RuntimeError: a made-up failure"


def test_when_all_are_at_one_place_none_is_blamed() -> None:
    assert "all ranks are at step 3" in describe([beat(0), beat(1)], interval=1)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_job_within_the_set_time(stopped: int, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 10_000, "hang_minutes": 0.2})
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [sys.executable, "-m", *launcher, "longred_megatron.train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run, deadline = tmp_path / "run", time.monotonic() + 120
    beat, metrics = run / "ranks" / f"rank-{stopped:05}.json", run / "metrics.jsonl"
    while not (beat.exists() and metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = json.loads(beat.read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    patience = threading.Timer(120, agent.kill)
    patience.start()
    output = ""
    assert agent.stdout is not None
    for line in agent.stdout:
        output += line
        if "stopped or gone" in line:
            os.kill(pid, signal.SIGKILL)  # torchrun would wait for it for half a minute
            break
    output += agent.stdout.read()
    patience.cancel()
    assert agent.wait() != 0
    assert f"rank {stopped} (pid {pid}" in output and "stopped or gone" in output, output
    assert (run / "ranks" / f"rank-{1 - stopped:05}.stack.txt").read_text()
