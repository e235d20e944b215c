"""Ranks that this machine runs by itself end with what started them, however that ends."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longred_megatron.parallel.local_ranks import run_ranks

STARTED = 60  # seconds for the fork server's imports, on a busy machine
ENDED = 15  # 5 on a quiet one


def sleep(join: Callable[[str], None], folder: Path) -> None:
    """A rank that takes signals as a training run does: as a wish to stop later."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_starter(number: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    told.mkdir()
    temporary = Path(
        tempfile.mkdtemp(prefix="ranks-")
    )  # short: the fork server's socket has a path of 107 bytes at most
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "tests.parallel.test_local_ranks", str(told)]
    starter = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert wait_for(lambda: len(list(told.iterdir())) == 2, STARTED)
        ranks = [int(path.name) for path in told.iterdir()]
        starter.send_signal(number)
        assert wait_for(lambda: starter.poll() is not None, ENDED)
        assert wait_for(lambda: not any(map(is_running, ranks)), ENDED)
        if number != signal.SIGKILL:
            assert list(temporary.iterdir()) == []
    finally:
        starter.kill()
        shutil.rmtree(temporary)
        for path in told.iterdir():
            if is_running(int(path.name)):
                os.kill(int(path.name), signal.SIGKILL)


if __name__ == "__main__":
    from tests.parallel.test_local_ranks import sleep as by_its_module

    signal.signal(signal.SIGTERM, leave)
    run_ranks(by_its_module, 2, Path(sys.argv[1]))


def test_a_long_path_of_the_temporary_folder_is_told(tmp_path: Path) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    # A process of its own: this one's fork server may run already, and needs no new socket.
    code = "from longred_megatron.parallel.local_ranks import run_ranks; run_ranks(print, 1)"
    environment = os.environ | {"TMPDIR": str(long)}
    end = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"UserError: TMPDIR={long}: too long a path" in end.stderr
