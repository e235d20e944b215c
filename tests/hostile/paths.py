"""Inputs that are no such thing: each message says which path, and what is wrong with it."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.case import (
    CACHE,
    DRIFT,
    EVALUATE,
    FP8,
    PERTURBATION,
    PLAN,
    PREPARE,
    QUERIES,
    REHEARSE,
    SELECT,
    SMOLLM2,
    STUDY,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    VECTORS,
    VERIFY,
    Case,
    Prepare,
    as_it_is,
)

type Words = Callable[[str], tuple[str, ...]]

INPUTS: dict[str, Words] = {
    "train RECIPE": lambda path: ("train", path),
    "train model.hf": lambda path: (*TRAIN, f"model.hf={path}"),
    "train teacher.hf": lambda path: (*TRAIN, f"teacher.hf={path}"),
    "train data": lambda path: (*TRAIN, f"data.texts={{{path}: 1.0}}"),
    "rehearse model.hf": lambda path: (*REHEARSE, f"model.hf={path}"),
    "prepare_data --input": lambda path: (*PREPARE, path),
    "prepare_data --tokenizer": lambda path: (
        "prepare_data",
        "--input",
        "corpus",
        "--output",
        "out/x",
        "--tokenizer",
        path,
    ),
    "evaluate --hf": lambda path: (*EVALUATE, path),
    "evaluate --reference": lambda path: (*EVALUATE, "model", "--reference", path),
    "evaluate --runs": lambda path: (*EVALUATE, "model", "--runs", path),
    "evaluate --text": lambda path: (*EVALUATE, "model", "--text", path),
    "evaluate --long-text": lambda path: (*EVALUATE, "model", "--long-text", path),
    "select_layers RECIPE": lambda path: ("select_layers", path, *SELECT[2:]),
    "select_layers model.hf": lambda path: (*SELECT, f"model.hf={path}"),
    "doctor RECIPE": lambda path: ("doctor", path, "--output", "out"),
    "analyze drift --hf": lambda path: (*DRIFT, "model", path),
    "analyze drift --runs": lambda path: (*DRIFT, "model", "--runs", path),
    "analyze drift --text": lambda path: (*DRIFT, "model", "run/hf", "--text", path),
    "analyze positional-vectors --hf": lambda path: (*VECTORS, path),
    "analyze perturbation --hf": lambda path: (*PERTURBATION, path),
    "analyze query-states --hf": lambda path: (*QUERIES, "model", path),
    "analyze fp8 --hf": lambda path: (*FP8, path),
    "analyze fp8 --text": lambda path: (*FP8, "model", "--text", path),
    "study STUDY": lambda path: ("study", path, *STUDY[2:]),
    "plan RECIPE": lambda path: ("plan", path, *PLAN[2:]),
    "plan model.hf": lambda path: (*PLAN, f"model.hf={path}"),
    "plan --gpu": lambda path: (*PLAN, f"--gpu={path}:mine"),
    "cache_targets RECIPE": lambda path: ("cache_targets", path, *CACHE[2:]),
    "cache_targets teacher.hf": lambda path: (*CACHE, f"teacher.hf={path}"),
    "hf-to-megatron --hf": lambda path: (*TO_MEGATRON, path),
    "megatron-to-hf --checkpoint": lambda path: (*TO_HF, path),
    "verify --hf": lambda path: ("convert_checkpoint", "verify", "--checkpoint", "converted", "--hf", path),
    "verify --checkpoint": lambda path: (*VERIFY, path),
    "make_smollm2 --gguf": lambda path: (*SMOLLM2, path),
}


def a_socket(folder: Path) -> None:
    os.chdir(folder)  # its path is at most 108 bytes long
    socket.socket(socket.AF_UNIX).bind("socket")


def locked(folder: Path) -> None:
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0)


def locked_file(folder: Path) -> None:
    (folder / "locked.txt").write_text("words")
    (folder / "locked.txt").chmod(0)


# name -> (path, preparation, without root's rights)
PATHS: dict[str, tuple[str, Prepare, bool]] = {
    "missing": ("nowhere", as_it_is, False),
    "300 characters": ("n" * 300, as_it_is, False),
    "6,000 characters": ("/".join(["n" * 100] * 60), as_it_is, False),
    "below a file": ("notes.txt/x", as_it_is, False),
    "a dangling link": ("link", lambda folder: (folder / "link").symlink_to("nowhere"), False),
    "a link to itself": ("loop", lambda folder: (folder / "loop").symlink_to("loop"), False),
    "a FIFO": ("fifo", lambda folder: os.mkfifo(folder / "fifo"), False),
    "a socket": ("socket", a_socket, False),
    "/dev/zero": ("/dev/zero", as_it_is, False),
    "/dev/null": ("/dev/null", as_it_is, False),
    "an empty folder": ("empty", lambda folder: (folder / "empty").mkdir(), False),
    "a text file": ("notes.txt", as_it_is, False),
    "a locked folder": ("locked", locked, True),
    "below a locked folder": ("locked/x", locked, True),
    "a locked file": ("locked.txt", locked_file, True),
    "with a line break": ("a\nb", as_it_is, False),
    "no UTF-8": ("\udcff", as_it_is, False),
}


def cases() -> Iterator[Case]:
    for name, words in INPUTS.items():
        for kind, (path, prepare, unprivileged) in PATHS.items():
            text = "text" in name or "input" in name
            if text and kind == "a text file":
                continue  # a sound one
            if "train data" in name and kind in ("with a line break", "no UTF-8"):
                continue  # YAML's
            said = "" if kind in ("with a line break", "no UTF-8") else path[:20]
            yield Case(f"{name} {kind}", words(path), prepare, says=(said,), unprivileged=unprivileged)
