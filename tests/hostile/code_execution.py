"""Files that carry code: none of it may run, whatever the command, and with a yes to every question."""

import io
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.hostile import bench
from tests.hostile.case import (
    EVALUATE,
    PREPARE,
    REHEARSE,
    RESUME,
    SMOLLM2,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    VERIFY,
    Case,
    Prepare,
    in_turn,
    payload,
    ran_code,
    writing,
)

# What a pickle may name to get at a function that runs commands: as itself, or as an attribute of a harmless module.
SHELLS = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "getoutput"),
    ("torch", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.serialization", "os.system"),
    ("pathlib", "os.system"),
    ("torch.utils.data", "os.system"),
]
EVALUATORS = [("builtins", "eval"), ("builtins", "exec"), ("torch.distributed.checkpoint.filesystem", "pickle.eval")]
CHECKPOINTS = [  # (command, the checkpoint it reads)
    ((*TO_HF, "converted"), "converted"),
    ((*VERIFY, "converted"), "converted"),
    (RESUME, "run/checkpoints/step-000002"),
]
MODELS = [(TRAIN, "train"), ((*TO_MEGATRON, "model"), "hf-to-megatron"), ((*EVALUATE, "model"), "evaluate")]
CODE = "from pathlib import Path\nPath({payload!r}).touch()\n"
MODULE = CODE + (
    "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    "class Configuration(LlamaConfig):\n    model_type = 'evil'\n"
    "class Network(LlamaForCausalLM):\n    config_class = Configuration\n"
    "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
TAG = "!!python/object/apply:os.system ['touch {payload}']"


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {payload(folder)}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def calling(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function, named as pickle's protocol 4 may: with dots."""
    texts = [b"\x8c" + bytes([len(text.encode())]) + text.encode() for text in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


def saved_by_torch(folder: Path) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"model.norm.weight": Bomb(folder)}, buffer)
    return buffer.getvalue()


def forge_marks(checkpoint: Path) -> None:
    """Makes checkpoint.json agree with the files, and leaves out its own digest, as earlier versions did."""
    path = checkpoint / "checkpoint.json"
    values = json.loads(path.read_text())
    values.pop("digest", None)
    for name in {*values["files"], *(file.name for file in checkpoint.glob("*.distcp"))}:
        content = (checkpoint / name).read_bytes()
        values["files"][name] = f"{len(content)}-{zlib.crc32(content):08x}"
    path.write_text(json.dumps(values))


def index_of(checkpoint: str, content: bytes | None = None, forged: bool = True) -> Prepare:
    """Replaces torch's index by a pickle, or, without one, puts a bomb into the real one."""

    def prepare(folder: Path) -> None:
        path = folder / checkpoint / ".metadata"
        if content is None:
            index = pickle.loads(path.read_bytes())
            index.planner_data = Bomb(folder)
            path.write_bytes(pickle.dumps(index))
        else:
            path.write_bytes(content.replace(b"PAYLOAD", os.fsencode(payload(folder))))
        if forged:
            forge_marks(folder / checkpoint)

    return prepare


def shell(module: str, name: str, text: str) -> Prepare:
    def prepare(folder: Path) -> None:
        writing("pickle", calling(module, name, text.format(payload=payload(folder))))(folder)

    return prepare


def index_calling(checkpoint: str, module: str, name: str, text: str) -> Prepare:
    def prepare(folder: Path) -> None:
        index_of(checkpoint, calling(module, name, text.format(payload=payload(folder))))(folder)

    return prepare


def bytes_at(checkpoint: str, key: str, by_torch: bool) -> Prepare:
    """Turns an entry into bytes that a loader would unpickle."""

    def prepare(folder: Path) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        content = saved_by_torch(folder) if by_torch else pickle.dumps(Bomb(folder))
        index = pickle.loads((folder / checkpoint / ".metadata").read_bytes())
        index.state_dict_metadata[key] = BytesStorageMetadata()
        index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != key}
        index.storage_data[MetadataIndex(key)] = _StorageInfo("__0_9.distcp", 0, len(content))
        (folder / checkpoint / "__0_9.distcp").write_bytes(content)
        (folder / checkpoint / ".metadata").write_bytes(pickle.dumps(index))
        forge_marks(folder / checkpoint)

    return prepare


def code_beside(model: str, file: str, **changes: object) -> Prepare:
    """A module beside a model, and a JSON file that names it."""

    def prepare(folder: Path) -> None:
        (folder / model / "evil.py").write_text(MODULE.format(payload=str(payload(folder))))
        bench.edit_json(f"{model}/{file}", lambda values: values | changes)(folder)

    return prepare


def tagged(path: str, text: str) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / path).write_text(text.replace("TAG", TAG.format(payload=payload(folder))))

    return prepare


def cases() -> Iterator[Case]:
    for case in (*checkpoints(), *modules(), *weights(), *recipes()):
        yield replace(case, check=ran_code)


def checkpoints() -> Iterator[Case]:
    for command, checkpoint in CHECKPOINTS:
        # A run goes on from the checkpoint before.
        then = {"code": (0, 2), "writes": ("run",)} if command == RESUME else {"says": (r"converted",)}
        name = f"{command[min(1, len(command) - 1)].replace('recipe.yaml', 'resume')}: "
        yield Case(f"{name}the real index with a bomb", command, index_of(checkpoint), **then)
        yield Case(f"{name}a bomb, sums not forged", command, index_of(checkpoint, forged=False), **then)
        for module, function in SHELLS:
            prepare = index_calling(checkpoint, module, function, "touch {payload}")
            yield Case(f"{name}index calls {module} {function}", command, prepare, **then)
        for module, function in EVALUATORS:
            prepare = index_calling(checkpoint, module, function, "__import__('os').system('touch {payload}')")
            yield Case(f"{name}index calls {module} {function}", command, prepare, **then)
        for key in (
            "common_state/shard_0_1",
            "output_layer.weight",
            "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4",
        ):
            for by_torch in (True, False):
                kind = "torch.save" if by_torch else "pickle"
                # Entries that hold no weights may be passed over.
                passed = {} if key == "output_layer.weight" else {"code": (0, 2), "says": ()}
                yield Case(
                    f"{name}bytes at {key}, {kind}", command, bytes_at(checkpoint, key, by_torch), **then | passed
                )


def modules() -> Iterator[Case]:
    """auto_map: transformers would import a module of the model's folder, after a question or without one."""
    classes = {"AutoConfig": "evil.Configuration", "AutoModelForCausalLM": "evil.Network"}
    known = {"auto_map": classes}
    unknown = {"auto_map": classes, "model_type": "evil", "architectures": ["Network"]}
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    for command, name in (*MODELS, (REHEARSE, "rehearse"), ((*VERIFY, "converted"), "verify")):
        rest = {"seconds": 60.0, "quick": False} if name == "rehearse" else {}
        prepare = code_beside("model", "config.json", **unknown)
        if name != "verify":
            yield Case(f"{name}: config.json of an unknown type with auto_map", command, prepare, says=("config.json",))
        prepare = code_beside("model", "config.json", **known)
        yield Case(f"{name}: config.json with auto_map", command, prepare, code=(0, 2), **rest)
    for command, name in (((*PREPARE, "corpus"), "prepare_data"), ((*EVALUATE, "model"), "evaluate")):
        prepare = code_beside("model", "tokenizer_config.json", **tokenizer)
        yield Case(f"{name}: tokenizer with auto_map", command, prepare, code=(0, 2))
        prepare = in_turn(prepare, lambda folder: (folder / "model" / "tokenizer.json").unlink())
        yield Case(f"{name}: tokenizer with auto_map alone", command, prepare, says=("model",))
        prepare = in_turn(
            code_beside("model", "tokenizer_config.json", **tokenizer),
            bench.config("auto_map", {"AutoConfig": "evil.Configuration"}),
            bench.config("model_type", "evil"),
        )
        yield Case(f"{name}: both with auto_map", command, prepare, code=(0, 2))
    for model in ("model", "teacher"):
        prepare = code_beside(model, "tokenizer_config.json", **tokenizer)
        yield Case(f"train: {model}'s tokenizer with auto_map", TRAIN, prepare, code=(0, 2))
    prepare = code_beside("converted/hf_source", "config.json", **unknown)
    moved = in_turn(prepare, lambda folder: (folder / "model").rename(folder / "elsewhere"))
    yield Case("megatron-to-hf: source with auto_map", (*TO_HF, "converted"), moved, says=("hf_source|evil",))


def weights() -> Iterator[Case]:
    """Weights as pickles: in torch's file beside no safetensors, under the name of safetensors, named by an index."""

    def replaced(name: str, in_index: bool = False) -> Prepare:
        def prepare(folder: Path) -> None:
            (folder / "model" / "model.safetensors").unlink()
            (folder / "model" / name).write_bytes(saved_by_torch(folder))
            if in_index:
                weight_map = {"weight_map": {"model.norm.weight": name}, "metadata": {}}
                (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(weight_map))

        return prepare

    for command, name in (*MODELS, ((*VERIFY, "converted"), "verify")):
        yield Case(f"{name}: pytorch_model.bin", command, replaced("pytorch_model.bin"), says=("safetensors",))
        yield Case(
            f"{name}: a pickle called model.safetensors",
            command,
            replaced("model.safetensors"),
            says=("model.safetensors",),
        )
        yield Case(
            f"{name}: an index that names a pickle",
            command,
            replaced("weights.bin", in_index=True),
            says=("weights.bin|safetensors",),
        )
    yield Case(
        "make_smollm2: a pickle as GGUF",
        (*SMOLLM2, "pickle"),
        shell("os", "system", "touch {payload}"),
        says=("pickle",),
    )
    yield Case(
        "prepare_data: a pickle as tokenizer",
        (*PREPARE[:4], "pickle.model", *PREPARE[5:], "corpus"),
        lambda folder: (folder / "pickle.model").write_bytes(pickle.dumps(Bomb(folder))) and None,
        says=("pickle.model",),
    )


def recipes() -> Iterator[Case]:
    """YAML tags that make Python objects."""
    yield Case("recipe: a tag for all", TRAIN, tagged("recipe.yaml", "TAG"), says=("recipe.yaml",))
    yield Case("recipe: a tag in a value", TRAIN, tagged("recipe.yaml", "training: {steps: TAG}"), says=("line 1",))
    yield Case(
        "recipe: a tag in its base",
        TRAIN,
        in_turn(tagged("other.yaml", "run: {dir: TAG}"), tagged("recipe.yaml", "base: other.yaml")),
        says=("other.yaml",),
    )
    yield Case("recipe: a tag as a key", TRAIN, tagged("recipe.yaml", "? TAG\n: 1"), says=("recipe.yaml",))
    yield Case(
        "override: a tag",
        (*TRAIN, "optimizer.lr=!!python/object/apply:os.system ['touch {here}/payload']"),
        says=("optimizer.lr",),
    )
    yield Case("rehearse: a tag", REHEARSE, tagged("recipe.yaml", "model: TAG"), says=("recipe.yaml",))
    yield Case("resume: a tag in the run's recipe", RESUME, tagged("run/recipe.yaml", "model: TAG"), says=("run",))
