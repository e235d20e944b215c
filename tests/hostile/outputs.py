"""Outputs that cannot be written: found before the work, with the path and the reason."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile import bench
from tests.hostile.case import (
    BENCH,
    CACHE,
    DEMO_TEXTS,
    DOCTOR,
    DRIFT,
    EVALUATE,
    FP8,
    MERGE,
    PLAN,
    PREPARE,
    RESUME,
    SELECT,
    SMOLLM2,
    STUDY,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    Case,
    as_it_is,
    in_turn,
    writing,
)

Words = Callable[[str], tuple[str, ...]]

COMMANDS: dict[str, tuple[Words, str]] = {
    "train run.dir": (lambda out: (*TRAIN[:2], "training.steps=1", f"run.dir={out}"), r"run\.dir"),
    "train debug.dump_microbatches": (
        lambda out: (*TRAIN, f"debug.dump_microbatches={out}"),
        r"dump_microbatches",
    ),
    "prepare_data --output": (lambda out: (*PREPARE[:-3], "--output", f"{out}", "--input", "corpus"), "--output|PATH"),
    "evaluate --output": (lambda out: (*EVALUATE[:-2], out, "--hf", "model"), "--output|PATH"),
    "evaluate --write-prompts": (
        lambda out: (*EVALUATE[:-3], "--write-prompts", out, "--hf", "model"),
        "--write-prompts|PATH",
    ),
    "select_layers --output": (lambda out: (*SELECT, "--output", out), "--output|PATH"),
    "analyze drift --output": (lambda out: (*DRIFT, "model", "run/hf", "--output", out), "--output|PATH"),
    "analyze fp8 --output": (lambda out: (*FP8, "model", "--output", out), "--output|PATH"),
    "doctor --output": (lambda out: (*DOCTOR[:-1], out), "--output|PATH"),
    "study --output": (lambda out: (*STUDY[:-1], out), "--output|PATH"),
    "plan --output": (lambda out: (*PLAN[:-1], out), "--output|PATH"),
    "bench --output": (lambda out: (*BENCH[:-1], out), "--output|PATH"),
    "cache_targets teacher.cache": (lambda out: (*CACHE[:2], f"teacher.cache={out}"), "teacher.cache|PATH"),
    "train teacher.cache": (lambda out: (*TRAIN, f"teacher.cache={out}"), "teacher.cache|PATH"),
    "hf-to-megatron --output": (lambda out: (*TO_MEGATRON[:2], "--output", out, "--hf", "model"), "--output|PATH"),
    "megatron-to-hf --output": (
        lambda out: (*TO_HF[:2], "--output", out, "--checkpoint", "converted"),
        "--output|PATH",
    ),
    "merge --output": (lambda out: (*MERGE[:4], out, *MERGE[5:], "teacher"), "--output|PATH"),
    "make_demo_texts --output": (lambda out: (*DEMO_TEXTS, out), "--output|PATH"),
    "make_smollm2 --output": (lambda out: ("make_smollm2", "--output", out, "--gguf", "notes.txt"), "--output|PATH"),
}
LONG = "n" * 300


def loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def locked(folder: Path) -> None:
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)


# name -> (output, preparation, reason, without root's rights)
PLACES = {
    "below a file": ("notes.txt/out", as_it_is, "file", False),
    "a name too long": (LONG, as_it_is, "too long", False),
    "a folder's name too long": (f"{LONG}/out", as_it_is, "too long", False),
    "a path too long": ("/".join(["n" * 100] * 50), as_it_is, "too long", False),
    "a dangling link": ("link", lambda folder: (folder / "link").symlink_to("nowhere/at/all"), "link", False),
    "a link to itself": ("loop", loop, "link|loop", False),
    "below a link to itself": ("loop/out", loop, "link|loop", False),
    "in a read-only folder": ("locked/out", locked, "permission", True),
    "below a read-only folder": ("locked/a/b/out", locked, "permission", True),
    "a read-only folder": ("locked", locked, "permission", True),
    "in /proc": ("/proc/longred", as_it_is, "", False),
    "a FIFO": ("fifo", lambda folder: os.mkfifo(folder / "fifo"), "", False),
    "an empty text": ("", as_it_is, "", False),
}


def cases() -> Iterator[Case]:
    for command, (words, key) in COMMANDS.items():
        for place, (output, prepare, reason, unprivileged) in PLACES.items():
            if command.startswith("prepare_data") and place in (
                "a FIFO",
                "a read-only folder",
                "a link to itself",
                "a dangling link",
            ):
                continue  # a prefix: it is not that path which is written
            if place == "an empty text" and command.split()[0] in ("make_demo_texts", "train", "cache_targets"):
                continue  # this folder; no value
            said = key.replace("PATH", output[:20] or "not empty")
            yield Case(f"{command} {place}", words(output), prepare, says=(said, reason), unprivileged=unprivileged)
    yield from in_use()
    yield from full_disks()


def in_use() -> Iterator[Case]:
    """The output is something else of the user's."""
    for command in (
        "evaluate --output",
        "evaluate --write-prompts",
        "select_layers --output",
        "analyze drift --output",
        "analyze fp8 --output",
        "doctor --output",
        "study --output",
        "plan --output",
        "bench --output",
        "hf-to-megatron --output",
        "merge --output",
        "megatron-to-hf --output",
        "train run.dir",
        "make_smollm2 --output",
    ):
        words, _ = COMMANDS[command]
        for output in ("corpus", "notes.txt", "."):
            yield Case(f"{command} is {output}", words(output), says=(r"corpus|notes|\.|work",))
    yield Case("prepare_data --output is an existing set", COMMANDS["prepare_data --output"][0]("set"), says=("set",))
    for command in ("cache_targets teacher.cache", "train teacher.cache"):
        yield Case(f"{command} is notes.txt", COMMANDS[command][0]("notes.txt"), says=("teacher.cache.*notes.txt",))
    yield Case("make_demo_texts --output is a file", (*DEMO_TEXTS, "notes.txt"), says=("notes.txt",))
    for suffix in (".bin", ".idx", ".json"):
        yield Case(
            f"prepare_data --overwrite, and set{suffix} is a folder",
            ("prepare_data", "--overwrite", *COMMANDS["prepare_data --output"][0]("new")[1:]),
            lambda folder, suffix=suffix: (folder / f"new{suffix}").mkdir(),
            says=(f"new{suffix}",),
        )
    yield Case(
        "run.dir has a NUL",
        TRAIN[:2],
        writing("recipe.yaml", 'base: other.yaml\nrun: {dir: "a\\0b"}\n'),
        says=("recipe.yaml.*line 2",),
    )
    nul = in_turn(
        lambda folder: (folder / "recipe.yaml").rename(folder / "other.yaml"),
        writing("recipe.yaml", 'base: other.yaml\nrun: {dir: "a\\0b"}\n'),
    )
    yield Case("run.dir has a NUL, in a recipe with a base", TRAIN[:2], nul, says=("recipe.yaml.*line 2.*NUL",))
    yield Case(
        "debug.dump_microbatches has a NUL",
        TRAIN,
        bench.edit_recipe(debug={"dump_microbatches": "a\0b"}),
        says=("recipe.yaml.*line 5.*NUL",),
    )
    yield Case("model.hf has a NUL", TRAIN, bench.edit_recipe(model={"hf": "a\0b"}), says=("recipe.yaml.*NUL",))
    yield Case(
        "a data prefix has a NUL",
        TRAIN,
        bench.edit_recipe(data={"texts": {"a\0b": 1.0}}),
        says=("recipe.yaml.*line 3.*NUL",),
    )


def full_disks() -> Iterator[Case]:
    """No file may grow above so many bytes."""
    small = {
        "train run.dir": ("out",),
        "prepare_data --output": (),
        "evaluate --output": (),
        "select_layers --output": (),
        "analyze drift --output": (),
        "analyze fp8 --output": (),
        "plan --output": (),
        "cache_targets teacher.cache": ("out",),
        "hf-to-megatron --output": (),
        "merge --output": (),
        "megatron-to-hf --output": (),
        "make_demo_texts --output": (),
        "train debug.dump_microbatches": ("out", "dumps"),
    }
    for command, writes in small.items():
        words, _ = COMMANDS[command]
        output = "dumps" if "dump" in command else "out"
        for limit in (0, 100, 4000):
            # The run's own files are its last state: what it said before the disk was full.
            yield Case(
                f"{command}, no file above {limit} bytes",
                words(output),
                writes=writes,
                file_limit_bytes=max(1, limit),
                says=("disk|space|large|full|written",),
            )
    yield Case(
        "train goes on, no file above 100,000 bytes",
        RESUME,
        writes=("run",),
        file_limit_bytes=100_000,
        says=("step-000003", "disk|space|large|full"),
    )
    yield Case("make_smollm2, no file above 10 bytes", (*SMOLLM2, "notes.txt"), file_limit_bytes=10, says=("",))
