"""Checkpoints that are not what they were, and those that were made to do harm."""

import io
import json
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from longred_megatron.checkpoint import tensor_files
from longred_megatron.checkpoint.distributed import DESCRIPTION, read_description
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from tests.checkpoint.small_models import edit_json, write_model
from tools.convert_checkpoint import main

PAYLOAD = Path("payload-ran")


class Touch:
    """A pickle of it makes the file PAYLOAD when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (PAYLOAD,)


class ByAttribute:
    """The same, by a name that only `find_class` of protocol 4 follows: module, then attributes with dots."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def pickled(self) -> bytes:
        def text(value: str) -> bytes:
            return b"\x8c" + bytes([len(value)]) + value.encode()

        return b"\x80\x04" + text(self.module) + text(self.name) + b"\x93" + text(f"touch {PAYLOAD}") + b"\x85R."


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("converted")
    source = write_model("llama_3", folder / "source")
    main(["hf-to-megatron", "--hf", str(source), "--output", str(folder / "checkpoint")])
    return source, folder / "checkpoint"


@pytest.fixture
def checkpoint(converted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted[1], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def index(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / tensor_files.INDEX).read_bytes())


def forge(checkpoint: Path, content: bytes) -> None:
    """Writes an index, and a checkpoint.json that vouches for it, as an attacker would."""
    (checkpoint / tensor_files.INDEX).write_bytes(content)
    from longred_megatron.checkpoint.distributed import _mark

    files = json.loads((checkpoint / DESCRIPTION).read_text())["files"]
    files |= {path.name: _mark(path) for path in checkpoint.iterdir() if path.name in files}
    edit_json(checkpoint / DESCRIPTION, files=files, digest=None)


def problem(checkpoint: Path) -> str:
    with pytest.raises(UserError) as caught:
        main(["megatron-to-hf", "--checkpoint", str(checkpoint), "--output", "output"])
    assert not PAYLOAD.exists() and not Path("output").exists()
    return str(caught.value)


GADGETS = (
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.serialization", "os.system"),
    ("torch", "os.system"),
    ("pathlib", "os.system"),
    ("pathlib", "Path.touch"),
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("torch", "hub"),
    ("collections", "OrderedDict.fromkeys"),
)


@pytest.mark.parametrize(("module", "name"), GADGETS)
def test_an_index_that_names_anything_else_runs_nothing(checkpoint: Path, module: str, name: str) -> None:
    forge(checkpoint, ByAttribute(module, name).pickled())
    assert f"names {module}.{name}" in problem(checkpoint)


def test_a_gadget_within_a_whole_index_runs_nothing(checkpoint: Path) -> None:
    changed = index(checkpoint)
    changed.planner_data = Touch()
    forge(checkpoint, pickle.dumps(changed))
    assert "it names pathlib.Path.touch" in problem(checkpoint)


@pytest.mark.parametrize(
    "key", ["common_state/shard_0_1", "decoder.final_layernorm.weight", "x._extra_state/shard_0_1"]
)
def test_an_entry_turned_into_bytes_is_not_unpickled(checkpoint: Path, key: str) -> None:
    changed = index(checkpoint)
    stored = io.BytesIO()
    torch.save([Touch()], stored)
    [data] = checkpoint.glob("*.distcp")
    place = next(iter(changed.storage_data.values()))
    at = type(place)(data.name, data.stat().st_size, len(stored.getvalue()))
    data.write_bytes(data.read_bytes() + stored.getvalue())
    changed.state_dict_metadata[key] = BytesStorageMetadata()
    changed.storage_data = {k: v for k, v in changed.storage_data.items() if k.fqn != key} | {MetadataIndex(key): at}
    forge(checkpoint, pickle.dumps(changed))
    assert "no tensors" in problem(checkpoint)
    (checkpoint / "metadata.json").touch()  # as earlier versions had it, whose bytes an export does not read
    if key == "decoder.final_layernorm.weight":
        assert "no tensors" in problem(checkpoint)
    else:
        main(["megatron-to-hf", "--checkpoint", str(checkpoint), "--output", "output"])
        assert not PAYLOAD.exists()
    with pytest.raises(Exception, match=r"(?i)weights.only|no tensors|KeyError|common_state"):
        tensor_files.read_earlier_values(checkpoint)
    assert not PAYLOAD.exists()


def test_an_index_reads_files_of_its_folder_alone(checkpoint: Path) -> None:
    changed = index(checkpoint)
    for place in changed.storage_data.values():
        place.relative_path = "../checkpoint/" + place.relative_path
    forge(checkpoint, pickle.dumps(changed))
    assert "not of this folder" in problem(checkpoint)


def test_nothing_but_tensors_is_written(checkpoint: Path) -> None:
    entries = index(checkpoint).state_dict_metadata
    assert entries and not [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]


ARCHITECTURE = asdict(Architecture("llama", 32, 4, 4, 2, 8, 48, 101, 1e-6, *[False] * 5, {"rope_theta": 1e4}, 64))
DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no files": ({"files": {}, "digest": None}, "does not list the files"),
    "files elsewhere": ({"files": {".metadata": "", "../x": ""}, "digest": None}, "does not list the files"),
    "files a list": ({"files": []}, "files: Input should be"),
    "no files key": ({"files": None}, "files: Field required"),
    "another dtype": ({"dtype": "int4"}, "dtype: Input should be 'bf16', 'fp16' or 'fp32'"),
    "an edited number": ({"source_hf": "/elsewhere"}, "checkpoint.json is not as it was written"),
    "an architecture with text": ({"architecture": {"family": "llama"}}, "architecture.hidden_size"),
    "an unknown number": ({"architecture": ARCHITECTURE | {"residual_scale": 2}}, "residual_scale is not known"),
    "an architecture without heads": ({"architecture": ARCHITECTURE | {"num_kv_heads": 0}}, "num_kv_heads is 0"),
    "a step of text": ({"step": "two"}, "step: Input should be a valid integer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_description_that_was_changed_is_named(checkpoint: Path, damage: str) -> None:
    changes, message = DAMAGES[damage]
    edit_json(checkpoint / DESCRIPTION, **changes)
    assert message in problem(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000, '"\ud800"', "{" + "9" * 5000 + "}"])
def test_a_description_that_is_none_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / DESCRIPTION).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "not a checkpoint of this project (checkpoint.json" in problem(checkpoint)


def test_a_renamed_checkpoint_says_its_step(checkpoint: Path) -> None:
    edit_json(checkpoint / DESCRIPTION, step=2, digest=None)
    assert read_description(checkpoint).step == 2
    renamed = checkpoint.rename(checkpoint.with_name("step-000007"))
    assert "the checkpoint of step 2, renamed" in problem(renamed)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "folder"])
def test_damaged_files_are_named(checkpoint: Path, name: str, damage: str) -> None:
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "changed" else b""))
    assert re.search(rf"{re.escape(name)} is not as it was written", problem(checkpoint))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", b"\x80\x04]q\x00.", b"\x80\x04N."])
def test_an_index_that_is_none_is_one_message(checkpoint: Path, content: bytes) -> None:
    forge(checkpoint, content)
    assert "cannot be loaded" in problem(checkpoint)
