"""Ends a job in which some rank has stopped making progress, and names that rank.

Every rank keeps a file in the run folder up to date with what it is doing. A rank that sees no progress of its own for
too long, usually because it waits for another in a collective, reads all of them, says who is behind, and exits; the
launcher then ends the others.
"""

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longred_megatron.files import write_text

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
MOST_LISTED = 8


class Watchdog:
    """A thread beside the training of one rank.

    Args:
        folder: shared by all ranks; each writes rank-00000.json, and rank-00000.stack.txt when it gives up.
        num_ranks: of the world. Files of other ranks are an earlier, larger world's.
        limit_seconds: without progress of this rank before it gives up.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, limit_seconds: float) -> None:
        self._folder, self._rank, self._num_ranks, self._limit = folder, rank, num_ranks, limit_seconds
        self._interval = min(10.0, limit_seconds / 10)
        self._doing, self._place, self._since = "starting", 0, time.time()
        self._failure: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        if error is not None and not isinstance(error, SystemExit):  # the others, which wait, will want to know
            self._failure = f"{type(error).__name__}: {error}"
            self._write()
            return
        self._path(self._rank).unlink(missing_ok=True)
        with suppress(OSError):  # others are still in it
            self._folder.rmdir()

    def progress(self, doing: str) -> None:
        """Notes that this rank has got as far as `doing`, for instance "step 3"."""
        self._doing, self._place, self._since = doing, self._place + 1, time.time()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._write()
            if time.time() - self._since > self._limit:
                self._give_up()

    def _write(self) -> None:
        beat = {"rank": self._rank, "host": platform.node(), "pid": os.getpid(), "time": time.time()}
        beat |= {"doing": self._doing, "place": self._place, "since": self._since, "failure": self._failure}
        with suppress(OSError):  # a full disk is for the checkpoint to report
            write_text(self._path(self._rank), json.dumps(beat))

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05}.json"

    def _give_up(self) -> None:
        try:
            beats = [beat for rank in range(self._num_ranks) if (beat := _read(self._path(rank)))]
            print(
                f"error: rank {self._rank} has made no progress for {self._limit:.0f} seconds; "
                f"{describe(beats, self._interval)}; where each rank was: {self._folder}/rank-*.stack.txt. Start again "
                "to go on from the last checkpoint; a step that takes this long needs a larger training.hang_minutes",
                file=sys.stderr,
                flush=True,
            )
            with (self._folder / f"rank-{self._rank:05}.stack.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        finally:
            os._exit(EXIT_CODE)


def _read(path: Path) -> dict[str, Any] | None:
    """A rank's file; None where there is none, or no whole one."""
    try:
        beat = json.loads(path.read_text(encoding="utf-8"))
        return beat if beat.keys() >= {"rank", "host", "pid", "time", "doing", "place", "since", "failure"} else None
    except (OSError, ValueError, AttributeError):
        return None


def describe(beats: list[dict[str, Any]], interval: float) -> str:
    """Which rank holds up the others: those whose files are old are stopped or gone, otherwise those furthest behind.

    Args:
        beats: the files of all ranks, read now.
        interval: seconds between two writes of a file.
    """
    now = time.time()
    failed = [beat for beat in beats if beat["failure"]]
    if failed:
        return _listed(failed, lambda beat: f"gone, it failed at {beat['doing']}: {beat['failure']}")
    silent = [beat for beat in beats if now - beat["time"] > 3 * interval]
    if silent:
        listed = _listed(silent, lambda beat: f"silent for {now - beat['time']:.0f} s, last at {beat['doing']}")
        return f"{listed}: stopped or gone"
    first = min(beat["place"] for beat in beats)
    behind = [beat for beat in beats if beat["place"] == first]
    if len(behind) < len(beats):
        listed = _listed(behind, lambda beat: f"still at {beat['doing']}, for {now - beat['since']:.0f} s")
        return f"{listed}: behind the others"
    return f"all ranks are at {beats[0]['doing']}: they wait for each other in a collective"


def _listed(beats: list[dict[str, Any]], say: Callable[[dict[str, Any]], str]) -> str:
    names = [
        f"rank {beat['rank']} (pid {beat['pid']} on {beat['host']}) is {say(beat)}" for beat in beats[:MOST_LISTED]
    ]
    more = f" and {len(beats) - MOST_LISTED} more" if len(beats) > MOST_LISTED else ""
    return "; ".join(names) + more
