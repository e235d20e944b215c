"""Results of before, of another step, of another model or half of one: none passes for what was asked."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.bench import edit_json
from tests.hostile.case import EVALUATE, RESUME, TO_HF, TO_MEGATRON, TRAIN, VERIFY, Case, Prepare, damaged, in_turn

STEP = "run/checkpoints/step-000002"
SHARD, INDEX = "model-{}.safetensors", "model.safetensors.index.json"
TENSOR = "model.layers.2.mlp.up_proj.weight"
READERS = [(TRAIN, "train"), ((*TO_MEGATRON, "model"), "hf-to-megatron"), ((*EVALUATE, "model"), "evaluate")]
NOT_FINITE = ("has a NaN", "has an infinity")
AGAIN = (*RESUME[:2], "training.steps=2")


def cases() -> Iterator[Case]:
    yield from exports()
    yield from descriptions()
    yield from checkpoint_files()
    yield from tensors()


def rename(old: str, new: str) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return prepare


def remove(*paths: str) -> Prepare:
    def prepare(folder: Path) -> None:
        for path in paths:
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return prepare


def exports() -> Iterator[Case]:
    """A run whose two steps are done is started again, and `hf` is not theirs."""

    def renewed(folder: Path) -> str | None:
        new, good = (folder / each / "model.safetensors" for each in ("run/hf", "good"))
        return None if new.is_file() and new.read_bytes() == good.read_bytes() else "hf is not the second step's"

    old = in_turn(rename("run/hf", "good"), rename("run/hf-step-000001", "run/hf"))
    then = {"code": 0, "writes": ("run",), "check": renewed}
    yield Case("hf is of step 1", AGAIN, old, **then)
    yield Case("hf is gone", AGAIN, in_turn(rename("run/hf", "good")), **then)
    empty = in_turn(rename("run/hf", "good"), lambda folder: (folder / "run/hf").mkdir())
    yield Case("hf is empty", AGAIN, empty, **then)
    half = in_turn(
        lambda folder: shutil.copytree(folder / "run/hf", folder / "good"), remove("run/hf/model.safetensors")
    )
    yield Case("hf has no weights", AGAIN, half, **then)
    yield Case(
        "fewer steps than are done",
        (*RESUME[:2], "training.steps=1"),
        code=(0, 2),
        writes=("run",),
        says=(r"\b2\b.*(done|step)|step.*\b2\b",),
    )
    for name, new in (("of a later step", 9), ("of the last step", 3)):
        prepare = rename(STEP, f"run/checkpoints/step-{new:06}")
        yield Case(
            f"a checkpoint that is renamed, {name}",
            RESUME,
            prepare,
            code=(0, 2),
            writes=("run",),
            says=(f"step-{new:06}",),
        )

    def copy(folder):
        return shutil.copytree(folder / "run/checkpoints/step-000001", folder / "run/checkpoints/step-000003") and None

    yield Case(
        "an older checkpoint, copied as the last", RESUME, copy, code=(0, 2), writes=("run",), says=("step-000003",)
    )


def descriptions() -> Iterator[Case]:
    """checkpoint.json, as read by a conversion and at resume, where the checkpoint before takes its place."""
    changes: dict[str, Callable[[dict], object]] = {
        "files: {}": lambda v: v | {"files": {}},
        "files: null": lambda v: v | {"files": None},
        "files: a list": lambda v: v | {"files": ["__0_0.distcp"]},
        "no files": lambda v: {k: x for k, x in v.items() if k != "files"},
        "files above it": lambda v: v | {"files": v["files"] | {"../../../notes.txt": "1-00000000"}},
        "a mark that is a number": lambda v: v | {"files": dict.fromkeys(v["files"], 5)},
        "no architecture": lambda v: {k: x for k, x in v.items() if k != "architecture"},
        "architecture: null": lambda v: v | {"architecture": None},
        "an unknown key of architecture": lambda v: v | {"architecture": v["architecture"] | {"colour": 1}},
        "a missing key of architecture": lambda v: v | {"architecture": {"family": "llama"}},
        "an unknown family": lambda v: v | {"architecture": v["architecture"] | {"family": "mamba"}},
        "layers: 3": lambda v: v | {"architecture": v["architecture"] | {"num_layers": 3}},
        "layers: 10^15": lambda v: v | {"architecture": v["architecture"] | {"num_layers": 10**15}},
        "hidden_size: 0": lambda v: v | {"architecture": v["architecture"] | {"hidden_size": 0}},
        "hidden_size: a text": lambda v: v | {"architecture": v["architecture"] | {"hidden_size": "32"}},
        "rope: a list": lambda v: v | {"architecture": v["architecture"] | {"rope": [1]}},
        "dtype: int4": lambda v: v | {"dtype": "int4"},
        "no dtype": lambda v: {k: x for k, x in v.items() if k != "dtype"},
        "a list": lambda v: [v],
        "null": lambda v: "null",
    }
    for name, change in changes.items():
        yield Case(
            f"checkpoint.json of a conversion: {name}",
            (*TO_HF, "converted"),
            edit_json("converted/checkpoint.json", undigested(change)),
            says=("converted",),
        )
    for name, change in (
        ("source_hf: 5", lambda v: v | {"source_hf": 5}),
        ("no source_hf", lambda v: v | {"source_hf": None}),
    ):
        yield Case(
            f"checkpoint.json of a conversion: {name}",
            (*TO_HF, "converted"),
            edit_json("converted/checkpoint.json", undigested(change)),
            code=(0, 2),
        )
    for name in ("files: {}", "files: null", "no files", "a mark that is a number", "a list"):
        yield Case(
            f"checkpoint.json of a run: {name}",
            RESUME,
            edit_json(f"{STEP}/checkpoint.json", undigested(changes[name])),
            code=0,
            writes=("run",),
            says=("warning.*step-000002",),
        )
    for value in (1, 3, -1, "2", None, 2.0, True):
        yield Case(
            f"checkpoint.json of a run: step {value!r}",
            RESUME,
            edit_json(f"{STEP}/checkpoint.json", undigested(lambda v, value=value: v | {"step": value})),
            code=(0, 2),
            writes=("run",),
            says=("step-000002",),
        )
    for name, prepare in damaged("converted/checkpoint.json"):
        yield Case(f"checkpoint.json of a conversion, {name}", (*TO_HF, "converted"), prepare, says=("converted",))


def undigested(change: Callable[[dict], object]) -> Callable[[dict], object]:
    """Without the digest of its own that checkpoint.json has: earlier versions wrote none."""
    return lambda values: change({key: value for key, value in values.items() if key != "digest"})


def checkpoint_files() -> Iterator[Case]:
    for pattern in ("*.distcp", ".metadata"):
        for name, prepare in damaged(f"converted/{pattern}"):
            yield Case(f"verify: {pattern} {name}", (*VERIFY, "converted"), prepare, says=("converted",))
        for name, prepare in damaged(f"{STEP}/{pattern}"):
            yield Case(
                f"resume: {pattern} {name}",
                RESUME,
                prepare,
                code=0,
                writes=("run",),
                says=("warning.*step-000002", "resuming after step 1"),
            )
    for file in ("__0_0.distcp", ".metadata", "checkpoint.json"):
        yield Case(
            f"megatron-to-hf: no {file}", (*TO_HF, "converted"), remove(f"converted/{file}"), says=("converted",)
        )
    both = in_turn(*(remove(f"run/checkpoints/step-00000{n}/.metadata") for n in (1, 2)))
    yield Case("resume: both checkpoints damaged", RESUME, both, code=(0, 2), writes=("run",), says=("step-000001",))


def tensors() -> Iterator[Case]:
    """A model's files that lack a tensor, hold one twice or in another shape: never a random model instead."""

    def change(edit: Callable[[dict], object]) -> Prepare:
        def prepare(folder: Path) -> None:
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / "model" / "model.safetensors")
            edit(tensors)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                folder / "model" / "model.safetensors",
                {"format": "pt"},
            )

        return prepare

    def twice(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / "model" / INDEX).read_text())
        from safetensors.torch import load_file, save_file

        first, second = (folder / "model" / SHARD.format(n) for n in (1, 2))
        save_file(load_file(first) | {TENSOR: load_file(second)[TENSOR] + 1}, first, {"format": "pt"})
        (folder / "model" / INDEX).write_text(json.dumps(index))

    edits: dict[str, tuple[Callable[[dict], object], str]] = {
        "lacks a tensor": (lambda t: t.pop(TENSOR), TENSOR),
        "lacks the last norm": (lambda t: t.pop("model.norm.weight"), "norm.weight"),
        "has a tensor under another name": (lambda t: t.update(weight=t.pop(TENSOR)), TENSOR),
        "has a tensor of another shape": (lambda t: t.update({TENSOR: t[TENSOR].T}), TENSOR),
        "has a tensor of one dim": (lambda t: t.update({TENSOR: t[TENSOR].flatten()}), TENSOR),
        "has integers": (lambda t: t.update({TENSOR: t[TENSOR].long()}), TENSOR),
        "has a NaN": (lambda t: t[TENSOR].__setitem__((0, 0), float("nan")), TENSOR),
        "has an infinity": (lambda t: t[TENSOR].__setitem__((0, 0), float("inf")), TENSOR),
        "has nothing": (lambda t: t.clear(), "model"),
    }
    for command, reader in READERS:
        for name, (edit, words) in edits.items():
            # A conversion keeps every bit, so a warning does.
            code = (0, 2) if name in NOT_FINITE and reader == "hf-to-megatron" else 2
            yield Case(f"{reader}: model.safetensors {name}", command, change(edit), code, (re.escape(words),))
        for name, prepare in damaged("model/model.safetensors"):
            if name != "flipped":  # another number is a sound one
                yield Case(f"{reader}: model.safetensors {name}", command, prepare, says=("model",))
        yield Case(f"{reader}: two shards hold a tensor", command, twice, says=(re.escape(TENSOR),))
        for name, edit, words in INDEXES:
            prepare = in_turn(sharded, edit_json(f"model/{INDEX}", edit))
            # One that is wrong about files of the folder changes nothing: they are asked themselves.
            code, words = ((0, 2), "") if name in HARMLESS else (2, words)
            yield Case(f"{reader}: an index that {name}", command, prepare, code, (words,))


HARMLESS = ("names the other file", "leaves out a tensor")
INDEXES: list[tuple[str, Callable[[dict], object], str]] = [
    ("names a missing file", lambda v: v["weight_map"].update({TENSOR: "gone.safetensors"}), "gone"),
    ("names the other file", lambda v: v["weight_map"].update({TENSOR: SHARD.format(1)}), "up_proj|model-1"),
    ("leaves out a tensor", lambda v: v["weight_map"].pop(TENSOR) and None, "up_proj"),
    (
        "leads outside",
        lambda v: v["weight_map"].update({TENSOR: "../teacher/model.safetensors"}),
        "index|outside|teacher",
    ),
    ("has no map", lambda v: {"metadata": {}}, "index"),
    ("has a list for a map", lambda v: {"weight_map": [1]}, "index"),
    ("has numbers for files", lambda v: {"weight_map": dict.fromkeys(v["weight_map"], 3)}, "index"),
    ("is a list", lambda v: [1], "index"),
]


def sharded(folder: Path) -> None:
    """The model's weights in two files."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    shards = {name: 2 if "layers.2" in name else 1 for name in tensors}
    for number in (1, 2):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == number}
        save_file(part, folder / "model" / SHARD.format(number), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: SHARD.format(n) for name, n in shards.items()}}
    (folder / "model" / INDEX).write_text(json.dumps(index))
