"""Ends are ends: signals at any moment, to any command; within five seconds, with nothing left."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.case import (
    EVALUATE,
    PREPARE,
    REHEARSE,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    VERIFY,
    Case,
    Interrupt,
    as_it_is,
    in_turn,
)

LONG_TRAIN = ("train", "recipe.yaml", "run.dir=out", "training.steps=100000", "training.checkpoint_every_steps=2")


def started_long_ago(seconds: float) -> Callable[[Path], bool]:
    """After so many seconds of a command."""
    first: dict[Path, float] = {}

    def when(folder: Path) -> bool:
        return time.monotonic() - first.setdefault(folder, time.monotonic()) > seconds

    return when


def has(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: any(folder.glob(pattern))


def many_texts(folder: Path) -> None:
    text = (folder / "corpus" / "b.jsonl").read_text()
    (folder / "corpus" / "c.jsonl").write_text(text * 2000)


SLOW = {
    "prepare_data": ((*PREPARE, "corpus"), many_texts, has("out/.*partial")),
    "prepare_data, 2 workers": ((*PREPARE, "corpus", "--workers=2"), many_texts, has("out/.*partial")),
    "evaluate": ((*EVALUATE, "model", "--samples=1000", "--depths=50"), as_it_is, started_long_ago(0.1)),
    "hf-to-megatron": ((*TO_MEGATRON, "model"), as_it_is, has("out.partial")),
    "megatron-to-hf": ((*TO_HF, "converted"), as_it_is, has("out.partial")),
    "verify": ((*VERIFY, "converted"), as_it_is, started_long_ago(0.1)),
    "make_demo_texts": (("make_demo_texts", "--output", "out"), as_it_is, started_long_ago(0.1)),
}


def cases() -> Iterator[Case]:
    for number in (signal.SIGTERM, signal.SIGINT):
        code = 128 + number
        for name, (words, prepare, when) in SLOW.items():
            yield Case(
                f"{name}: {number.name}", words, prepare, (code, -number), seconds=30, interrupt=Interrupt(number, when)
            )
        yield Case(
            f"train: {number.name} while it trains",
            LONG_TRAIN,
            code=code,
            writes=("out",),
            seconds=30,
            interrupt=Interrupt(number, has("out/checkpoints/step-000004")),
            check=whole,
        )
        yield Case(
            f"train: {number.name} at once",
            TRAIN,
            code=(code, -number, 0),  # a signal in the last step finds it done
            writes=("out",),
            interrupt=Interrupt(number, started_long_ago(0.1)),
        )
        yield Case(
            f"rehearse: {number.name}",
            REHEARSE,
            code=(code, -number),
            seconds=60,
            quick=False,
            interrupt=Interrupt(number, lambda folder: any((folder.parent / "tmp").glob("rehearsal-*/run"))),
        )
        for name in ("train", "evaluate", "prepare_data"):
            words = {"train": TRAIN, "evaluate": (*EVALUATE, "model"), "prepare_data": (*PREPARE, "corpus")}[name]
            yield Case(
                f"{name}: {number.name} in the first second",
                words,
                code=(code, -number),
                forked=False,
                interrupt=Interrupt(number, started_long_ago(0.7)),
                seconds=30,
            )
    for name, pattern in (("while it trains", "out/metrics.jsonl"), ("while it saves", "out/checkpoints/*.partial")):
        yield Case(
            f"train: kill -9 {name}",
            LONG_TRAIN,
            code=-signal.SIGKILL,
            writes=("out",),
            seconds=30,
            interrupt=Interrupt(signal.SIGKILL, has(pattern)),
        )
    yield Case(
        "prepare_data: again after kill -9",
        (*PREPARE, "corpus"),
        in_turn(many_texts, killed),
        code=0,
        seconds=60,
        check=lambda folder: leftover(folder / "out"),
        quick=False,
    )


def whole(folder: Path) -> str | None:
    names = [path.name for path in (folder / "out" / "checkpoints").iterdir()]
    return f"left {names}" if any(not name.startswith("step-") or "." in name for name in names) else None


def killed(folder: Path) -> None:
    """prepare_data with two workers, killed while it writes, as a cluster does: the first process alone."""
    from tests.hostile import runner

    pid = os.fork()
    if pid == 0:
        runner.become(lambda: runner.call((*PREPARE, "corpus", "--workers=2")), Path(os.devnull), 1, 2)
    while not any(folder.glob("out/.*")):
        time.sleep(0.05)
    time.sleep(2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def leftover(out: Path) -> str | None:
    names = sorted(path.name for path in out.iterdir())
    return None if names == ["set.bin", "set.idx", "set.json"] else f"left {names}"
