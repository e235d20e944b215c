"""A process of a check that fails, dies or hangs ends the check and not the doctor, and is told with rank and host."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longred_megatron.doctor.findings import RanksFailedError, TimeUpError, of_failure
from longred_megatron.doctor.team import Report, Team
from longred_megatron.parallel.local_ranks import run_ranks
from tests.test_launch import free_port


def raises(report: Report) -> None:
    print("a library's last words", flush=True)
    raise ValueError("no backend")


def is_killed(report: Report) -> None:
    report("step 3")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(report: Report) -> None:
    report("a collective")
    time.sleep(600)


def one_raises_and_others_wait(report: Report) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("out of memory")
    time.sleep(600)


def test_an_exception_is_told_with_what_was_written_last() -> None:
    with pytest.raises(RanksFailedError) as failed:
        Team(60).run(raises, seconds=60)
    finding = of_failure("Layout", failed.value.failures)
    assert finding.status == "wrong" and f"rank 0 on {os.uname().nodename}: ValueError: no backend" in finding.text
    assert "a library's last words" in finding.trace and 'raise ValueError("no backend")' in finding.trace


def test_a_process_that_dies_is_told_with_its_place() -> None:
    with pytest.raises(RanksFailedError, match=r"killed by signal 9 at: step 3; is there enough memory\?"):
        Team(60).run(is_killed, seconds=60)


def test_a_process_that_hangs_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailedError, match="no result within 15 seconds; last seen at: a collective"):
        Team(60).run(hangs, seconds=15)
    assert time.monotonic() - started < 40


def test_no_check_begins_when_the_time_is_over() -> None:
    with pytest.raises(TimeUpError):
        Team(1).run(hangs, seconds=60)


def _rank(join: Callable[[str], None], port: str, folder: Path) -> None:
    # A rank of run_ranks as torchrun would start it; its own number is known once it has joined.
    join("to know the rank")
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    team = Team(120)
    started = time.monotonic()
    try:
        team.run(one_raises_and_others_wait, seconds=100)
    except RanksFailedError as error:
        told = [f"{failure.rank}: {failure.text}" for failure in error.failures]
        (folder / str(rank)).write_text("\n".join(told))
    assert time.monotonic() - started < 60
    torch.distributed.barrier()


def test_one_failure_ends_the_processes_of_all_ranks_and_is_told_first(tmp_path: Path) -> None:
    run_ranks(_rank, 2, free_port(), tmp_path)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second == "1: ValueError: out of memory\n0: ended, since another rank had failed"
