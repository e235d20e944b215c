"""The processes of a side: kept from its first repeat to its last, and asked for one repeat at a time."""

import logging
import multiprocessing
import os
import resource
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from longred_megatron.bench.base import Facts, Start
from longred_megatron.device import on_gpu
from longred_megatron.parallel.local_ranks import end_with_parent


def preload(modules: Sequence[str]) -> None:
    """Before the first process: what its sides need is imported once, and not by each."""
    multiprocessing.set_forkserver_preload(list(modules))


class CaseError(Exception):
    """Why a case has no times."""


@dataclass(frozen=True)
class Repeat:
    """Of one repeat. peak_bytes: of memory so far, since the side was built; see `_Memory`."""

    seconds: float
    facts: Facts
    peak_bytes: int


class Processes:
    """A side in a process of its own, or in one a rank, which have found each other as under torchrun.

    Raises CaseError from `repeat` when a process fails; what it has to say stands on standard error.
    """

    def __init__(self, name: str, start: Start, num_ranks: int = 1) -> None:
        self._name = name
        # Forked from a process that has imported everything: seconds each. With a GPU, that one would hold it.
        context: Any = multiprocessing.get_context("spawn" if on_gpu() else "forkserver")
        self._ranks: list[tuple[Any, Connection]] = []
        port = _free_port()
        for rank in range(num_ranks):
            own, its = context.Pipe()
            process = context.Process(target=_serve, args=(its, start, rank, num_ranks, port))
            process.start()
            its.close()
            self._ranks.append((process, own))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self._ranks:
            process.kill()
        for process, _ in self._ranks:
            process.join()

    def repeat(self) -> Repeat:
        """One repeat on all ranks: the slowest one's time, the largest memory, the first one's facts."""
        for _, connection in self._ranks:
            connection.send(None)
        answers = [self._answer(*each) for each in self._ranks]
        return Repeat(max(each.seconds for each in answers), answers[0].facts, max(each.peak_bytes for each in answers))

    def _answer(self, process: Any, connection: Connection) -> Repeat:
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            process.join(5)
            raise CaseError(f"{self._name} ended with {process.exitcode}; is there enough memory?") from None
        if isinstance(answer, str):
            print(answer, file=sys.stderr)
            raise CaseError(f"{self._name} failed: {answer.strip().splitlines()[-1]}")
        assert isinstance(answer, Repeat)
        return answer


def _serve(connection: Connection, start: Start, rank: int, num_ranks: int, port: int) -> None:
    """What a side's process runs until it is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # bars and warnings of libraries; a failure is sent
    if num_ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    try:
        memory = _Memory()
        side = start()
        memory.reset_peak()
        while True:
            try:
                connection.recv()
            except EOFError:
                return  # the one that asks has ended
            side.before()
            _wait_for_device()
            began = time.perf_counter()
            side.once()
            _wait_for_device()
            seconds = time.perf_counter() - began
            connection.send(Repeat(seconds, side.facts(), memory.peak()))
    except BaseException:
        connection.send(traceback.format_exc())


def _wait_for_device() -> None:
    if on_gpu():
        torch.cuda.synchronize()


class _Memory:
    """Peak memory of this process: on a GPU what torch allocated there; on a CPU the resident set, less what was
    resident before the side was built (the libraries that both sides import)."""

    def __init__(self) -> None:
        self._before = 0 if on_gpu() else _resident("VmRSS")

    def reset_peak(self) -> None:
        """From now on: what building needed for a moment does not count."""
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for it (proc(5))

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if on_gpu() else _resident("VmHWM") - self._before


def _resident(key: str) -> int:
    """Bytes. Not `ru_maxrss`, which a process takes over from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
