"""A Llama model in a quantised GGUF file -> a Hugging Face folder in bf16.

Settings and vocabulary are read by transformers. The weights are read here, since its `from_pretrained(gguf_file=...)`
gives the same bits but needs one more package (accelerate), and drops tensors that it has no place for without a word.
"""

import contextlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from longred_megatron.errors import UserError

ARCHITECTURE = "llama"
WEIGHTS = "model.safetensors"
# Written by transformers beside the tokenizer's settings: how it was called here.
_CALL_SETTINGS = ("is_local", "local_files_only")


def convert_gguf(gguf_file: Path, output: Path, window: int | None = None) -> None:
    """Writes config.json, model.safetensors (bf16, dequantised) and the tokenizer into the folder `output`.

    Args:
        output: an existing, empty folder.
        window: max_position_embeddings to write, in tokens; None: the file's own. RoPE stays as it is.

    Raises:
        UserError: no reader for GGUF, not a Llama GGUF file, a window above the file's own, or tensors
            that are missing, unexpected or of another shape than the file's settings give.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the Python package gguf, which reads the quantised weights, is not installed; "
            'run "make setup", or install the project with its extra: pip install -e ".[gguf]"'
        )
    tensors = _open(gguf_file)
    with _quiet_transformers():
        config = _config(gguf_file, window)
        config.save_pretrained(output)
        _save_tokenizer(gguf_file, output, config.max_position_embeddings)
    save_file(_weights(gguf_file, tensors, config), output / WEIGHTS, metadata={"format": "pt"})
    (output / WEIGHTS).chmod((output / "config.json").stat().st_mode)  # safetensors lets only the owner read


def _open(gguf_file: Path) -> dict[str, Any]:
    """GGUF name -> tensor, still quantised."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{gguf_file}: not a whole GGUF file ({error}); download it again") from None
    field = reader.get_field("general.architecture")
    found = field.contents() if field else None
    if found != ARCHITECTURE:
        raise UserError(
            f"{gguf_file}: general.architecture is {found!r}; only {ARCHITECTURE!r} can be converted, "
            "take the model's safetensors instead"
        )
    return {tensor.name: tensor for tensor in reader.tensors}


def _config(gguf_file: Path, window: int | None) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True, trust_remote_code=False
    )
    own_window = config.max_position_embeddings
    if window is not None and not 1 <= window <= own_window:
        raise UserError(
            f"window is {window}: must be 1 to {own_window}, the window of {gguf_file}; a longer one has to "
            "be trained, which is what the recipes are for"
        )
    config.max_position_embeddings = window or own_window
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    # GGUF holds it in fp32: the shortest decimal of that number is what the model was made with, 1e-05.
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    vars(config).pop("_model_name_or_path", None)  # general.name, where transformers expects a path
    return config


def _save_tokenizer(gguf_file: Path, output: Path, window: int) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.model_max_length = window
    rule = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    if rule and rule.contents() == "smollm":
        # transformers takes GPT-2's rule for every such vocabulary. SmolLM's splits digits off first, which
        # decides between one token and two for the blanks of "=  2".
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(output)
    settings_file = output / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _CALL_SETTINGS}
    settings_file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(gguf_file: Path, tensors: dict[str, Any], config: Any) -> dict[str, Tensor]:
    """Hugging Face name -> tensor in bf16, for every tensor of a model of this `config`."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    # One that GGUF has no name for is missing under its own.
    gguf_names = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in shapes}
    if problems := _tensor_problems(gguf_file, tensors, shapes, gguf_names):
        raise UserError(*problems)
    weights = {}
    for name, shape in tqdm(shapes.items(), desc="reading weights", unit=" tensors", disable=None):
        tensor = tensors[gguf_names[name]]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if "q_proj" in name:
            values = _rotary_halves(values, config.num_attention_heads)
        elif "k_proj" in name:
            values = _rotary_halves(values, config.num_key_value_heads)
        weights[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return weights


def _tensor_problems(
    gguf_file: Path, tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], gguf_names: dict[str, str]
) -> list[str]:
    missing = [name for name in gguf_names.values() if name not in tensors]
    extra = sorted(tensors.keys() - set(gguf_names.values()))
    problems = [
        f"{gguf_file}: {what} {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}; {advice}"
        for what, found, advice in (
            ("lacks tensors that its settings ask for:", missing, "download it again"),
            (
                "has tensors that a Llama model does not have:",
                extra,
                "take the model's safetensors instead",
            ),
        )
        if found
    ]
    # GGUF names the fastest dim first.
    return problems + [
        f"{gguf_file}: {gguf_names[name]} is {found}, its settings give {list(shape)}; download it again"
        for name, shape in shapes.items()
        if gguf_names[name] in tensors
        and (found := [int(size) for size in reversed(tensors[gguf_names[name]].shape)]) != list(shape)
    ]


def _rotary_halves(rows: Any, num_heads: int) -> Any:
    """Puts a head's output rows in order: GGUF has a rotated pair side by side, Hugging Face in two halves.

    [heads x head_dim, ...] -> the same shape.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its tokenizer conversion warns of classes that are not used here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
