"""Small random models of every family as Hugging Face folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

# No two sizes are equal, so that a swapped dim is seen. The vocabulary is odd, so that it needs padding.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 3.0, 4.0],
}

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama_2": lambda: LlamaConfig(**SIZES, num_attention_heads=4),
    "llama_3": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama_3_2": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_biases": lambda: LlamaConfig(**SIZES, **GROUPED, attention_bias=True, mlp_bias=True),
    "llama_yarn": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=YARN_ROPE),
    "llama_linear": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=LINEAR_ROPE),
    "llama_dynamic": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=DYNAMIC_ROPE),
    "llama_longrope": lambda: LlamaConfig(**SIZES, **GROUPED, rope_parameters=LONGROPE),
    "mistral": lambda: MistralConfig(**SIZES, **GROUPED, head_dim=16, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, **GROUPED),
    "qwen2_tied": lambda: Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, **GROUPED, head_dim=16),
    # Its own tokens are above this vocabulary.
    "phi3": lambda: Phi3Config(**SIZES, **GROUPED, eos_token_id=2, pad_token_id=None),
    "qwen3_tied": lambda: Qwen3Config(**SIZES, **GROUPED, head_dim=16, tie_word_embeddings=True),
}

ONE_OF_EACH_FAMILY = tuple({make().model_type: name for name, make in reversed(MODELS.items())}.values())


def write_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, sizes: dict[str, Any] | None = None, **save: Any
) -> Path:
    """A model of `MODELS` with every parameter random: transformers starts norms at one, biases at zero.

    sizes: other values for keys of its config.
    """
    config = MODELS[name]()
    if sizes:
        settings = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # one a layer
        config = type(config)(**settings | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder, **save)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
