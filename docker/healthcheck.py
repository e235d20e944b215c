"""Whether the ranks of a training in this container are alive: exit code 1, with the reason, when one is silent.

Each rank says in its run folder what it is doing (longred_megatron/training/watchdog.py). A container without a
training is healthy.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MODULE = "longred_megatron.train"
MOST_SILENT_SECONDS = 60  # a rank writes at least every ten


def trainings() -> Iterator[tuple[int, Path, list[str]]]:
    """Of each process that trains: number, working folder, and the words after the module's name."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has just ended, or does something else
            command = (process / "cmdline").read_text().split("\0")[:-1]
            words = command[command.index(MODULE) + 1 :]
            yield int(process.name), (process / "cwd").readlink(), words


def problems() -> Iterator[str]:
    """A sentence for each rank of this container that is silent."""
    for pid, folder, words in trainings():
        from longred_megatron.recipe import load_recipe  # here, since it takes seconds

        os.chdir(folder)
        recipe, *overrides = [word for word in words if not word.startswith("-")]
        for path in load_recipe(Path(recipe), overrides).run.dir.glob("ranks/rank-*.json"):
            beat = json.loads(path.read_text())
            silent = time.time() - beat["time"]
            if (beat["host"], beat["pid"]) == (platform.node(), pid) and silent > MOST_SILENT_SECONDS:
                yield f"rank {beat['rank']} is silent for {silent:.0f} s, last at {beat['doing']}"


if __name__ == "__main__":
    sys.exit("; ".join(problems()) or 0)
