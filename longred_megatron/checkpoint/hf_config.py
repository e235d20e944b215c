"""The exported model's config.json and the files around the weights, made from the source folder's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from longred_megatron.checkpoint.weight_files import PICKLES
from longred_megatron.errors import UserError
from longred_megatron.files import read_json, reason

CONFIG = "config.json"
RECORD = "longred_megatron.json"  # of an export: see `huggingface.Record`
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin.index.json",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    *PICKLES,
)
_TEMPLATES = "additional_chat_templates"  # the one sub-folder transformers reads beside a model
# File -> the key that holds the window, in tokens, where it has one.
_WINDOW_KEYS = {"tokenizer_config.json": "model_max_length", "generation_config.json": "max_length"}


def exported_config(
    source: dict[str, Any], rope: dict[str, Any], max_position_embeddings: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The source's config.json with another RoPE, window (tokens) and dtype, in the source's dialect.

    transformers 5 writes `rope_parameters`; before, `rope_theta` stood alone, `rope_scaling` held the rest.
    """
    config = {**source, "max_position_embeddings": max_position_embeddings}
    rope = dict(rope)
    if "type" in rope:  # the name of `rope_type` in old files; the two must not differ
        rope["type"] = rope["rope_type"]
    if "rope_parameters" in source:
        config["rope_parameters"] = rope
        if "rope_theta" in source:
            config["rope_theta"] = rope["rope_theta"]
        if source.get("rope_scaling"):  # transformers would prefer it
            config["rope_scaling"] = None
    else:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    names = [key for key in ("dtype", "torch_dtype") if key in source]
    for name in names or ["dtype" if "rope_parameters" in source else "torch_dtype"]:
        config[name] = str(dtype).removeprefix("torch.")
    return config


def copy_companions(source: Path, target: Path) -> None:
    """Copies what is neither weights nor config.json: tokenizer, generation settings, chat templates.

    Hidden files and pickles are left out.
    """
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and not path.name.startswith(".")
            and path.name not in (CONFIG, RECORD)
            and not path.name.endswith(_WEIGHTS)
        ):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)


def widen_companions(folder: Path, old_window: int, new_window: int) -> None:
    """Sets the window (tokens) in the tokenizer's and generation's settings where they repeat the old."""
    for file, key in _WINDOW_KEYS.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            settings = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); download the file again") from None
        if isinstance(settings, dict) and settings.get(key) == old_window:
            write_json(path, settings | {key: new_window})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes it: two spaces, one newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
