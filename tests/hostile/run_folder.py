"""The run folder: damaged, moved, of another run, or in use by one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.case import RESUME, TO_HF, Case, Interrupt, Prepare, damaged, editing, in_turn, writing
from tests.hostile.old_results import remove, rename

AGAIN = (*RESUME[:2], "training.steps=2")
LONG = ("train", "recipe.yaml", "training.steps=100000")


def cases() -> Iterator[Case]:
    yield from damages()
    yield from things_in_the_way()
    yield from two_runs()
    yield from moves()
    yield from other_recipes()


def damages() -> Iterator[Case]:
    for name, prepare in damaged("run/recipe.yaml"):
        code = (0, 2) if name == "flipped" else 2  # in a comment or not
        yield Case(f"recipe.yaml {name}", RESUME, prepare, code, writes=("run",), says=(r"run",))
    texts = {
        "null": "null",
        "a list": "[1]",
        "a number": "7",
        "NUL": "model: \0",
        "latin-1": b"model: \xe9",
        "a date": "model: 2024-01-01",
        "nested": "[" * 5000,
        "an anchor bomb": anchor_bomb(),
        "a section less": "model: {hf: m}",
    }
    for name, content in texts.items():
        yield Case(f"recipe.yaml is {name}", RESUME, writing("run/recipe.yaml", content), says=("run.dir|run/recipe",))
    for name, prepare in damaged("run/metrics.jsonl"):
        yield Case(f"metrics.jsonl {name}", RESUME, prepare, code=(0, 2), writes=("run",))
    lines = {
        "NUL": "\0\0\0\n",
        "latin-1": b'{"step": 1, "n": "\xe9"}\n',
        "a list": "[1]\n",
        "numbers": "1\n2\n",
        "no step": "{}\n",
        "step a text": '{"step": "1"}\n',
        "step null": '{"step": null}\n',
        "nested": "[" * 100000,
        "half a line": '{"step": 1, "loss": 2}\n{"step": 2, "lo',
        "steps to come": '{"step": 7}\n',
        "NaN": '{"step": NaN}\n',
        "a huge number": '{"step": 1' + "0" * 5000 + "}\n",
    }
    for name, content in lines.items():
        yield Case(
            f"metrics.jsonl holds {name}", RESUME, writing("run/metrics.jsonl", content), code=(0, 2), writes=("run",)
        )
    yield Case(
        "tensorboard's events are damaged",
        RESUME,
        editing("run/tensorboard/*", lambda c: c[::-1]),
        code=(0, 2),
        writes=("run",),
    )


def anchor_bomb() -> str:
    """Three kilobytes that stand for 10^15 texts."""
    lines = ['a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x", "x"]']
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 15)]
    return "\n".join(lines)


def things_in_the_way() -> Iterator[Case]:
    def instead(path: str, make: Callable[[Path], object]) -> Prepare:
        def prepare(folder: Path) -> None:
            if (folder / path).exists():
                remove(path)(folder)
            make(folder / path)

        return prepare

    file, folder = (lambda path: path.write_text("mine")), (lambda path: path.mkdir())
    fifo, link = (os.mkfifo), (lambda path: path.symlink_to("nowhere"))
    # A file is moved aside as an export is.
    yield Case("run/hf is a file", RESUME, instead("run/hf", file), code=(0, 2), says=("hf",), writes=("run",))
    yield Case("run/hf is a dangling link", RESUME, instead("run/hf", link), code=(0, 2), says=("hf",), writes=("run",))
    for path in ("run/checkpoints", "run/tensorboard", "run/ranks", "run"):
        yield Case(f"{path} is a file", RESUME, instead(path, file), says=(path,))
        yield Case(f"{path} is a dangling link", RESUME, instead(path, link), says=(path, "link|exist"))
    for path in ("run/recipe.yaml", "run/metrics.jsonl"):
        yield Case(f"{path} is a folder", RESUME, instead(path, folder), says=(path,), writes=("run",))
        yield Case(f"{path} is a FIFO", RESUME, instead(path, fifo), says=(path,), writes=("run",))
        yield Case(
            f"{path} is a dangling link", RESUME, instead(path, link), code=(0, 2), says=("run",), writes=("run",)
        )
    in_ranks = in_turn(lambda f: (f / "run/ranks").mkdir(), lambda f: (f / "run/ranks/rank-00000.json").mkdir())
    yield Case("run/ranks/rank-00000.json is a folder", RESUME, in_ranks, code=(0, 2), writes=("run",))
    for name, text in (
        ("garbage", "\0\1"),
        ("a list", "[]"),
        ("of another host", '{"rank": 0, "host": "x", "pid": 1}'),
    ):
        yield Case(
            f"run/ranks/rank-00000.json is {name}",
            RESUME,
            writing("run/ranks/rank-00000.json", text),
            code=(0, 2),
            writes=("run",),
        )
    yield Case(
        "step-000003 is a file",
        RESUME,
        writing("run/checkpoints/step-000003", "mine"),
        code=2,
        says=("step-000003",),
        writes=("run",),
    )
    yield Case(
        "step-000003 is an empty folder",
        RESUME,
        lambda f: (f / "run/checkpoints/step-000003").mkdir(),
        code=(0, 2),
        says=("step-000003",),
        writes=("run",),
    )
    yield Case(
        "step-99999999999999999999 is there",
        RESUME,
        lambda f: (f / f"run/checkpoints/step-{'9' * 20}").mkdir(),
        code=(0, 2),
        says=("step-9999",),
        writes=("run",),
    )
    yield Case(
        "no permission to write",
        RESUME,
        lambda f: (f / "run").chmod(0o500),
        unprivileged=True,
        says=("run", "permission"),
    )
    yield Case(
        "no permission to read a checkpoint",
        RESUME,
        lambda f: (f / "run/checkpoints/step-000002").chmod(0o000),
        unprivileged=True,
        code=2,
        says=("step-000002", "permission"),
    )
    yield Case(
        "no permission to read recipe.yaml",
        RESUME,
        lambda f: (f / "run/recipe.yaml").chmod(0o000),
        unprivileged=True,
        says=("recipe.yaml", "permission"),
    )


def started(folder: Path) -> None:
    """Another process trains in `out` and has begun."""
    from tests.hostile import runner

    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            runner.call((*LONG, "run.dir=out"))
        finally:
            os._exit(0)
    (folder.parents[1] / "other").write_text(str(pid))
    while not (folder / "out" / "metrics.jsonl").exists():
        time.sleep(0.02)


def killed(folder: Path) -> None:
    os.kill(pid := int((folder.parents[1] / "other").read_text()), signal.SIGKILL)
    os.waitpid(pid, 0)


def two_runs() -> Iterator[Case]:
    yield Case(
        "another run is in the folder",
        (*LONG[:2], "run.dir=out", LONG[2]),
        started,
        says=("out", r"pid|process"),
        writes=("out",),
        background=True,
    )
    yield Case(
        "another run is in the folder, by a link",
        (*LONG[:2], "run.dir=other", LONG[2]),
        in_turn(started, lambda f: (f / "other").symlink_to("out")),
        says=("out|other",),
        writes=("out",),
        background=True,
    )
    yield Case(
        "another run was killed",
        ("train", "recipe.yaml", "run.dir=out", LONG[2]),
        in_turn(started, killed),
        code=(143,),
        writes=("out",),
        interrupt=Interrupt(signal.SIGTERM, lambda f: grown(f / "out")),
    )


def grown(run: Path) -> bool:
    """A checkpoint or a lock does not matter: it trains, since its metrics are new."""
    path = run / "metrics.jsonl"
    return path.exists() and time.time() - path.stat().st_mtime < 1 and path.stat().st_size > 2000


def moves() -> Iterator[Case]:
    names = ("recipe.yaml", "run", "model", "teacher", "texts.bin", "texts.idx")

    def moved(folder: Path) -> None:
        (folder / "elsewhere").mkdir()
        for name in names:
            (folder / name).rename(folder / "elsewhere" / name)

    yield Case(
        "moved with recipe, model and texts",
        ("train", "elsewhere/recipe.yaml", "training.steps=3"),
        moved,
        code=0,
        writes=("elsewhere/run",),
        says=("resuming after step 2",),
    )
    yield Case(
        "moved, then exported",
        (*TO_HF, "elsewhere/run/checkpoints/step-000002"),
        moved,
        code=(0, 2),
        says=("written|model",),
    )
    yield Case(
        "renamed",
        (*RESUME, "run.dir=renamed"),
        rename("run", "renamed"),
        code=(0, 2),
        writes=("renamed",),
        says=("resuming after step 2|run.dir",),
    )
    yield Case(
        "the model is another folder of the same name",
        RESUME,
        in_turn(rename("model", "old"), rename("teacher", "model"), rename("old", "teacher")),
        code=(0, 2),
        writes=("run",),
    )


def other_recipes() -> Iterator[Case]:
    for key, value in (
        ("optimizer.lr", "2.0"),
        ("training.seed", "1"),
        ("model.rope.theta", "5.0e6"),
        ("objectives.long_text.weight", "3.0"),
        ("data.texts", "{set: 1.0}"),
        ("teacher.hf", "model"),
    ):
        yield Case(f"resume with another {key}", (*RESUME, f"{key}={value}"), says=(key.split(".")[0], "run.dir"))
