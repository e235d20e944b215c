"""The doctor's ranks: each starts a fresh process for whatever may fail, hang or leave a broken GPU behind.

What torchrun started keeps clear of the GPU and outlives every check, so that a check that fails becomes a finding with
its rank and host, and the next one begins with a new process.
"""

import faulthandler
import logging
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Failure, RanksFailedError, TimeUpError
from longred_megatron.errors import UserError, plain
from longred_megatron.parallel.local_ranks import end_with_parent

Report = Callable[[str], None]
"""Says where a process is; the last word of one that hangs."""

LOOK_SECONDS = 0.3  # between two looks at the own process and at the others' failures
LEAST_SECONDS = 5.0  # less than that is not worth a start
TRACE_CHARACTERS = 6000


@dataclass(frozen=True)
class _Outcome:
    """Of one rank's process. order: the how manieth failure it was; 0: none. text: why it has no result."""

    result: Any = None
    order: int = 0
    text: str = ""
    trace: str = ""


class Team:
    """All ranks of torchrun's world, or a world of this process.

    seconds: for all checks together.

    Raises:
        UserError: the ranks do not find each other.
    """

    def __init__(self, seconds: float) -> None:
        self.rank, self.size, self._store = 0, 1, None
        self._end, self._number = time.monotonic() + seconds, 0
        if "RANK" in os.environ:
            try:
                store, self.rank, self.size = next(iter(torch.distributed.rendezvous("env://")))
                self._store = torch.distributed.PrefixStore("doctor", store)
                torch.distributed.init_process_group(
                    "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=timedelta(minutes=20)
                )
            except (torch.distributed.DistError, ValueError, RuntimeError) as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise UserError(
                    f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT, {where} ({plain(str(error))[:200]}); start "
                    "them with torchrun, or with another free port"
                ) from None
        self.hosts: list[str] = self.gather(platform.node())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)  # the world: all ranks come to the same findings
        return values

    def first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.gather(value)[0]

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float, alone: bool = False) -> list[Any]:
        """Calls `function(report, *arguments)` in a fresh process of every rank; returns the results by rank.

        The processes have an environment as torchrun would give it, and enter a world by `groups.initialize`. They are
        killed at the end, whatever they are doing.

        Args:
            seconds: until they have a result.
            alone: on rank 0 alone, in a world of one.

        Raises:
            RanksFailedError: an exception, a signal, or no result in time; the other processes are ended.
            TimeUpError: the doctor's time is over.
        """
        port, limit = self.first((_free_port(), min(seconds, self._end - time.monotonic())))
        if limit < LEAST_SECONDS:
            raise TimeUpError
        self._number += 1
        outcome = None
        if not alone or self.rank == 0:
            environment = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            with _Process(environment, function, arguments, alone=alone or self.size == 1) as process:
                outcome = self._watch(process, limit)
                outcomes = self.gather(outcome)  # before the process is killed: others may still be talking to it
        else:
            outcomes = self.gather(outcome)
        told = [each for each in outcomes if each is not None]
        failures = [
            (each.order, Failure(rank, self.hosts[rank], each.text, each.trace))
            for rank, each in enumerate(outcomes)
            if each is not None and each.text
        ]
        if failures:
            causes = sorted((f for f in failures if f[0]), key=lambda failure: failure[0])
            raise RanksFailedError([failure for _, failure in causes + [f for f in failures if not f[0]]])
        return [each.result for each in told]

    def _watch(self, process: "_Process", limit: float) -> _Outcome:
        """Waits for the own process's result, for another rank's failure, or for the limit."""
        end, key = time.monotonic() + limit, f"failures-{self._number}"
        while True:
            outcome = process.look(LOOK_SECONDS)
            if outcome is None and time.monotonic() > end:
                where = f"; last seen at: {process.place}" if process.place else ""
                outcome = _Outcome(text=f"no result within {limit:.0f} seconds{where}", trace=process.trace())
            if outcome is not None:
                if outcome.text and self._store is not None:
                    return _Outcome(None, self._store.add(key, 1), outcome.text, outcome.trace)
                return outcome
            if self._store is not None and self._store.check([key]):
                return _Outcome(text="ended, since another rank had failed")


class _Process:
    """A fresh process that calls one function. What it prints goes into a file."""

    def __init__(
        self, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], alone: bool
    ) -> None:
        # Forked from a process that has imported everything: seconds a check. With a GPU, that one would hold it.
        context: Any = multiprocessing.get_context("spawn" if on_gpu() else "forkserver")
        handle, log = tempfile.mkstemp(".txt", "doctor-")
        os.close(handle)
        self._log, self.place = Path(log), ""
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_call, args=(theirs, self._log, environment, alone, function, arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()
        self._log.unlink(missing_ok=True)

    def look(self, seconds: float) -> _Outcome | None:
        """What it has come to, after waiting for a word of it for some seconds; None: not there yet."""
        if not wait([self._connection, self._process.sentinel], timeout=seconds):
            return None
        try:
            while self._connection.poll():
                kind, value = self._connection.recv()
                if kind == "at":
                    self.place = value
                elif kind == "done":
                    return _Outcome(value)
                else:
                    return _Outcome(text=value, trace=self.trace())
        except (EOFError, OSError):
            self._process.join(5)
        code = self._process.exitcode
        if code is None:
            return None
        ended = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = "; is there enough memory?" if code == -9 else ""
        where = f" at: {self.place}" if self.place else ""
        return _Outcome(text=f"its process was {ended}{where}{hint}", trace=self.trace())

    def trace(self) -> str:
        """The last lines that it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-TRACE_CHARACTERS:].strip()


def _call(
    connection: Connection,
    log: Path,
    environment: dict[str, str],
    alone: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What a fresh process runs. It stays until it is killed: its end would break what other ranks still do."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    faulthandler.enable()
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    os.environ.update(environment)
    if alone:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        message = ("done", function(lambda place: connection.send(("at", place)), *arguments))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        message = ("failed", f"{type(error).__name__}: {plain(str(error))[:400]}")
    connection.send(message)
    time.sleep(3600)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
