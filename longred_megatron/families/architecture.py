"""What a Hugging Face folder's config.json says of the model, in the project's terms."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longred_megatron.errors import UserError
from longred_megatron.rope.frequencies import rope_types

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary attention.

    Sizes are counts of elements. `rope` is transformers' `rope_parameters` mapping. `vocab_size` counts the rows of the
    embedding, which may be more than the tokenizer's entries.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: dict[str, Any]
    max_position_embeddings: int

    def num_parameters(self) -> int:
        """Trainable parameters, each counted once (a tied head is the embedding)."""
        query, kv = self.num_attention_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * query + 2 * kv + 3 * self.intermediate_size + 2)
        layer += self.qkv_bias * (query + 2 * kv) + self.attention_output_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size) + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def read_architecture(hf: Path) -> Architecture:
    """Reads `hf`/config.json.

    Raises:
        UserError: no such folder or file, a broken file, or a model this project cannot represent exactly.
    """
    path = Path(hf) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `hf` must be a Hugging Face model folder with a config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download the file again") from None
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")

    from transformers import AutoConfig  # slow to import; needed for the defaults config.json may leave out

    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # transformers validates with many exception types; all mean a bad config.json
        raise UserError(f"{path}: transformers refuses it: {error}") from None
    _check_representable(path, config)
    heads = config.num_attention_heads
    return Architecture(
        family=family,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or bool(getattr(config, "attention_bias", False)),
        attention_output_bias=family != "qwen2" and bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
    )


def _check_representable(path: Path, config: Any) -> None:
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"{path}: hidden_act {config.hidden_act!r} is not supported, only 'silu'")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in rope_types():
        problems.append(f"{path}: rope_type {rope_type!r} is not supported; supported are {', '.join(rope_types())}")
    sliding = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if (sliding is not None and config.model_type == "mistral") or "sliding_attention" in layer_types:
        problems.append(
            f"{path}: sliding_window {sliding} limits attention, which this project does not train; "
            "set it to null if the model is meant to attend to its whole window"
        )
    biases = {key: bool(getattr(config, key, False)) for key in ("attention_bias", "mlp_bias")}
    if config.model_type != "qwen2" and len(set(biases.values())) > 1:
        problems.append(
            f"{path}: {biases} is not supported: Megatron has one switch for the biases of the attention's output "
            "and of the MLP; set the other to true and add zero biases to the weights"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"{path}: partial_rotary_factor must be 1")
    if problems:
        raise UserError(*problems)
