"""The user's things beside an output, under the names that this program uses for its own: all of them stay."""

from collections.abc import Callable, Iterator
from pathlib import Path

from longred_megatron.files import MARKER
from tests.hostile.case import (
    CACHE,
    DEMO_TEXTS,
    DRIFT,
    EVALUATE,
    MERGE,
    PLAN,
    PREPARE,
    RESUME,
    SELECT,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    Case,
)

OUTPUTS = {
    "train": (TRAIN, "out"),
    "hf-to-megatron": ((*TO_MEGATRON, "model"), "out"),
    "megatron-to-hf": ((*TO_HF, "converted"), "out"),
    "merge": ((*MERGE, "teacher"), "out"),
    "prepare_data": ((*PREPARE, "corpus"), "out/set"),
    "evaluate": ((*EVALUATE, "model"), "out"),
    "select_layers": (SELECT, "out"),
    "analyze drift": ((*DRIFT, "model", "run/hf"), "out"),
    "plan": (PLAN, "out"),
    "cache_targets": (CACHE, "out"),
    "make_demo_texts": ((*DEMO_TEXTS, "out"), "out"),
}


def folder_of_files(path: Path) -> None:
    (path / "chapters").mkdir(parents=True)
    (path / "thesis.txt").write_text("mine")


def a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def a_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.parent / "corpus")


def a_link_to_a_marked_folder(path: Path) -> None:
    a_link(path)
    if (path.parent / "corpus").is_dir():
        (path.parent / "corpus" / MARKER).touch()


def a_folder_called_as_the_marker(path: Path) -> None:
    folder_of_files(path)
    (path / MARKER).mkdir()


def names(path: str) -> Iterator[str]:
    head, _, tail = path.rpartition("/")
    above = f"{head}/" if head else ""
    yield from (f"{path}.partial", f"{above}.{tail}.incomplete", f"{above}.{tail}.partial")
    if tail == "set":
        yield from (f"{path}.bin.partial", f"{above}.{tail}.idx.partial", f"{above}.set.0")


def cases() -> Iterator[Case]:
    things: list[Callable[[Path], None]] = [
        folder_of_files,
        a_file,
        a_link,
        a_link_to_a_marked_folder,
        a_folder_called_as_the_marker,
    ]
    for command, (words, output) in OUTPUTS.items():
        for name in names(output):
            for make in things if name.endswith("t.partial") and "/" not in name else things[:2]:
                yield of(f"{command}: {name} is {make.__name__.replace('_', ' ')}", words, name, make)
    for name in (
        "run/checkpoints/step-000003.partial",
        "run/hf.partial",
        "run/checkpoints/mine",
        "run/thesis",
        "run/hf-step-000002",
        "run/checkpoints/damaged-step-000002",
        "run/.lock",
        "run/checkpoints/step-3",
    ):
        for make in things[:2]:
            yield of(f"resume: {name} is {make.__name__.replace('_', ' ')}", RESUME, name, make)


def of(title: str, words: tuple[str, ...], name: str, make: Callable[[Path], None]) -> Case:
    def lost(folder: Path) -> str | None:
        path = folder / name
        if make in (folder_of_files, a_folder_called_as_the_marker):
            kept = (path / "thesis.txt").exists() and (path / "chapters").is_dir()
        else:
            kept = path.is_symlink() or (path.is_file() and path.read_text() == "mine")
        return None if kept else f"{name} is gone"

    writes = ("run",) if words == RESUME else ("out",) if name.startswith("out/") else ()
    return Case(title, words, lambda folder: make(folder / name), code=(0, 2), writes=writes, check=lost)
