"""The ranks of a small world as processes of this machine: by torchrun, or without it for rehearsals and tests."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from longred_megatron.errors import UserError


def training_command(recipe: Path | str, num_ranks: int) -> list[str]:
    """The words of `torchrun ... -m longred_megatron.train RECIPE` for `num_ranks` ranks here, by this interpreter."""
    # Ranks of one machine need no name of it, and not every machine's own name leads to it.
    here = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, "-m", "torch.distributed.run", *here, "-m", "longred_megatron.train", str(recipe)]


def run_to_end(command: Sequence[str], folder: Path | None = None) -> None:
    """Runs a command in a process of its own, in `folder`; one thread a process, unless OMP_NUM_THREADS says otherwise.

    Raises:
        UserError: it failed, or is not there.
    """
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror}); correct the command") from None
    try:
        code = process.wait()
    finally:  # this process is to stop: so is that one, which ends its ranks
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        raise UserError(f"`{' '.join(command)}` failed with exit code {code}; its message is above")


def run_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Calls `function(join, *arguments)` in `num_ranks` processes of one thread each and waits for them.

    `join(name)` enters a fresh gloo world of all of them; after leaving it, another of another name can be entered.
    The processes are forked from one that has imported the function's module, so that its imports are paid for once.
    None of them outlives this call, whatever ends it, or this process.

    Raises:
        UserError: the path of the temporary folder is too long.
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: the first failure; the others are ended.
    """
    multiprocessing.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        try:
            context = torch.multiprocessing.start_processes(
                _rank,
                args=(num_ranks, Path(folder), function, arguments),
                nprocs=num_ranks,
                start_method="forkserver",
                join=False,
            )
            while not context.join(grace_period=1):
                pass
        except OSError as error:
            if "AF_UNIX path too long" not in str(error):
                raise
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()}: too long a path for the sockets between processes; set TMPDIR to a "
                "folder with a short one, such as /tmp"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            # It would take seconds to leave, with the terminal in its hands; the next call starts another.
            if (server := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
                os.kill(server, signal.SIGKILL)
            raise
        finally:  # Ctrl-C and SIGTERM too, which a rank itself takes as a wish to stop after the step
            ranks = multiprocessing.active_children()  # also where starting them was cut short
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


def _rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork stays: no collection has to look through it

    def join(name: str) -> None:
        store = torch.distributed.FileStore(str(folder / name), num_ranks)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=5)
        )

    function(join, *arguments)


def end_with_parent() -> None:
    """Waits for the end of the process that called `run_ranks`, even by `kill -9`, and ends this one at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
