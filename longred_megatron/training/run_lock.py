"""One run, one folder: a lock on the run folder that the system gives back when its owner is gone."""

import fcntl
import json
import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from longred_megatron.errors import UserError
from longred_megatron.files import reason

LOCK = "lock.json"  # in the run folder: host, process and since when, while a run is in it


class RunLock:
    """Keeps a second run out of a run folder, which several machines may share. The first rank of a run holds it.

    It is a POSIX record lock: the kernel, or the file server, gives it back when the process is gone, however that or
    its machine ends. What the file says is for the message. A process must not open the file while it holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK

    def __enter__(self) -> Self:
        """Raises UserError: another run is in the folder, or it cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
            owner = {"host": platform.node(), "pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
            os.truncate(self._file, 0)
            os.pwrite(self._file, json.dumps(owner).encode(), 0)
        except OSError as error:
            raise UserError(f"run.dir {self._folder}: cannot be written ({reason(error)}); choose another") from None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        with suppress(OSError):  # nothing was written: no run began
            self._folder.rmdir()

    def _locked(self) -> int:
        """The open file."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                said = os.pread(file, 1000, 0)
                os.close(file)
                raise UserError(f"run.dir {self._folder}: {_owner(said)}; wait for its end or choose another") from None
            except OSError as error:
                print(
                    f"warning: run.dir {self._folder}: its file system has no locks ({reason(error)}); "
                    "make sure that no second run uses it",
                    file=sys.stderr,
                )
                return file
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
            os.close(file)  # its owner has just removed it at its end


def _owner(said: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        owner = json.loads(said)
        return f"in use by process {owner['pid']} on {owner['host']} since {owner['since']}"
    return "in use by another run"
