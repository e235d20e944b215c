"""What surrounds a command: variables, locale, a pipe that closes, a folder that is gone."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.hostile.case import EVALUATE, MERGE, PREPARE, RESUME, TO_HF, TO_MEGATRON, TRAIN, VERIFY, Case, writing

ROOT = Path(__file__).parents[2]
EVERY = {
    "train": TRAIN,
    "prepare_data": (*PREPARE, "corpus"),
    "evaluate": (*EVALUATE, "model"),
    "hf-to-megatron": (*TO_MEGATRON, "model"),
    "megatron-to-hf": (*TO_HF, "converted"),
    "verify": (*VERIFY, "converted"),
    "merge": (*MERGE, "teacher"),
}
WORLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411"}


def cases() -> Iterator[Case]:
    yield from worlds()
    yield from locales()
    yield from pipes()


def worlds() -> Iterator[Case]:
    wrong: list[tuple[str, dict[str, str | None], str]] = [
        ("WORLD_SIZE=abc", {"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
        ("WORLD_SIZE=0", {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ("WORLD_SIZE=-1", {"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ("WORLD_SIZE is empty", {"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ("WORLD_SIZE=2 alone", {"WORLD_SIZE": "2"}, "RANK|WORLD_SIZE"),
        ("WORLD_SIZE=10^30", {"WORLD_SIZE": str(10**30)}, "WORLD_SIZE|ranks|replicas"),
        ("RANK alone", {"RANK": "0"}, "MASTER_ADDR|WORLD_SIZE"),
        ("RANK=x", WORLD | {"RANK": "x"}, "RANK"),
        ("RANK=-1", WORLD | {"RANK": "-1"}, "RANK"),
        ("RANK=5 of 1", WORLD | {"RANK": "5"}, "RANK"),
        ("no MASTER_ADDR", WORLD | {"MASTER_ADDR": None}, "MASTER_ADDR"),
        ("no MASTER_PORT", WORLD | {"MASTER_PORT": None}, "MASTER_PORT"),
        ("MASTER_PORT=x", WORLD | {"MASTER_PORT": "x"}, "MASTER_PORT"),
        ("MASTER_PORT=99999", WORLD | {"MASTER_PORT": "99999"}, "MASTER_PORT"),
        ("MASTER_ADDR is no host", WORLD | {"MASTER_ADDR": "no.such.host.invalid", "RANK": "0"}, "MASTER_ADDR|no.such"),
    ]
    for number, (name, variables, says) in enumerate(wrong):
        if variables.get("MASTER_PORT") == WORLD["MASTER_PORT"]:
            variables = variables | {"MASTER_PORT": str(int(WORLD["MASTER_PORT"]) + number)}  # none waits for another
        yield Case(f"train: {name}", TRAIN, environment=variables, says=(says,), seconds=15)
    for command in ("hf-to-megatron", "megatron-to-hf", "verify"):
        for name, variables in (("RANK alone", {"RANK": "0"}), ("WORLD_SIZE=abc", {"WORLD_SIZE": "abc"})):
            # One process, whatever is in the environment.
            yield Case(f"{command}: {name}", EVERY[command], environment=variables, code=(0, 2))


def locales() -> Iterator[Case]:
    # Without Python's UTF-8 mode torch cannot be imported; what is printed is ASCII all the same.
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}
    name = "mod\u00e8le-\u6a21\u578b"
    for command, words in (
        ("train", ("train", f"{name}/recipe.yaml")),
        ("evaluate", (*EVALUATE, name)),
        ("hf-to-megatron", (*TO_MEGATRON, name)),
        ("prepare_data", (*PREPARE, name)),
    ):
        yield Case(
            f"{command}: an ASCII locale, and a missing path that is not",
            words,
            environment=ascii_only,
            forked=False,
            seconds=40,
            quick=False,
        )
    yield Case(
        "prepare_data: an ASCII locale, and texts that are not",
        (*PREPARE, "x.txt"),
        writing("x.txt", "\u6a21\u578b caf\u00e9 " * 100),
        code=0,
        environment=ascii_only,
        forked=False,
        seconds=40,
    )
    yield Case("train: an ASCII locale", TRAIN, code=0, environment=ascii_only, forked=False, seconds=60)
    for variable in ("HOME", "TMPDIR", "PATH", "USER"):
        yield Case(f"train: no {variable}", TRAIN, environment={variable: None}, code=0)
    yield Case("train: TMPDIR is nowhere", TRAIN, environment={"TMPDIR": "/nowhere"}, code=0)
    yield Case("train: COLUMNS=x", TRAIN, environment={"COLUMNS": "x"}, code=0)


def pipes() -> Iterator[Case]:
    """A reader that goes away: no traceback, and what is written stays whole."""
    for command in ("prepare_data", "evaluate", "hf-to-megatron", "--help"):
        program, *arguments = EVERY.get(command, ("evaluate", "--help"))
        python = shlex.join([sys.executable, str(ROOT / "tools" / f"{program}.py"), *arguments])
        yield Case(
            f"{command}: a closed pipe",
            ("sh", f"{python} | true; exit ${{PIPESTATUS[0]}}"),
            code=(0, 1, 2, 141),
            forked=False,
            seconds=40,
            writes=("out",),
            quick=command == "--help",
        )
    yield Case("train: no folder to be in", RESUME, _gone, code=2, says=("recipe|folder|directory",))


def _gone(folder: Path) -> None:
    import os

    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
