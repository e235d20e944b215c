"""What of a config.json is no model at all, or is a model that transformers does not compute as its authors do.

A key that changes the computation and that nobody reads is the worst of mistakes: everything runs, with other numbers.
transformers keeps every key it does not know as an attribute, and says nothing. Many such keys are harmless (who
trained the model, with which tool), so that an unknown key alone is no reason to refuse. It is refused when its name
speaks of the computation (`_WORDS`: `dual_chunk_attention_config`, `residual_multiplier`) and its value switches
something on. A name that no word matches passes: a list of words is a net, and no proof.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from longred_megatron.settings import LONGEST_TOKENS

# The most that each size may be: what is above is a slip, and would take the program minutes to count.
LARGEST = {
    "hidden_size": 2**20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**24,
    "vocab_size": 2**24,
    "max_position_embeddings": LONGEST_TOKENS,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE_SWITCHES = ("truncate", "mrope_interleaved")  # YaRN's, and Qwen3-VL's
_LAYER_TYPES = ("full_attention", "sliding_attention")

_WORDS = (
    *("attention", "attn", "softmax", "causal", "chunk", "sliding", "window", "sparse", "head"),
    *("rope", "rotary", "alibi", "ntk", "yarn", "embed", "mup"),
    *("scale", "scaling", "multiplier", "softcap", "logit", "norm", "bias", "activation", "hidden_act"),
    *("expert", "moe", "router", "residual", "layer", "ffn", "mlp", "clip_qkv"),
    *("quant", "compress", "lora", "adapter", "configuration_files"),
)
# How it is computed, and not what; and dropout, which is off here.
_HARMLESS = ("implementation", "flash", "sdpa", "drop", "initializ")
# Read by transformers for every family, whether its config class declares them or not.
_READ = {
    "head_dim",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


def size_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the sizes of a model, each a sentence. One that is left out is transformers' own."""
    return [
        f"{key} is {_shown(raw[key])}: must be a whole number from 1 to {largest}"
        for key, largest in LARGEST.items()
        if raw.get(key) is not None and not (type(raw[key]) is int and 1 <= raw[key] <= largest)
    ]


def config_problems(raw: dict[str, Any], config: Any) -> list[str]:
    """What is wrong, each a sentence. raw: config.json; config: transformers' class made of it."""
    return [*ignored_keys(raw, config), *_head_problems(config), *number_problems(config), *_value_problems(config)]


def ignored_keys(raw: dict[str, Any], config: Any) -> Iterator[str]:
    """What speaks of the computation and is no setting of transformers' class, each a sentence."""
    known = _READ | {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys()
    for key, value in raw.items():
        name = key.lower()
        harmless = name.startswith("_") or any(word in name for word in _HARMLESS)
        if key in known or harmless or not any(word in name for word in _WORDS):
            continue
        if name == "is_causal" and value is not True:
            yield f"{_named(key)} is {_shown(value)}: attention that sees later tokens is not supported; remove the key"
        elif name != "is_causal" and not _is_off(value):
            yield (
                f"{_named(key)} is {_shown(value)}: {config.model_type} models do not have it in transformers, so that "
                "it would be ignored; use a model without it, or remove the key if the weights are meant without it"
            )


def _is_off(value: Any) -> bool:
    """Whether the value of an unknown key switches nothing on: null, false, empty, or the number 0 or 1."""
    return not value or (value == 1 and value is not True)


def _head_problems(config: Any) -> Iterator[str]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads, head_dim = getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None)
    if heads % kv_heads:
        yield f"num_key_value_heads is {kv_heads}: must divide the {heads} of num_attention_heads"
    if head_dim is None and hidden % heads:
        yield f"num_attention_heads is {heads}: must divide the {hidden} of hidden_size, or head_dim must be given"
    elif (dim := head_dim or hidden // heads) % 2:
        yield f"head_dim is {dim}: must be even, as RoPE rotates pairs"


def number_problems(config: Any) -> Iterator[str]:
    """What is wrong with the numbers of norms and RoPE, of any family in transformers, each a sentence."""
    epsilon = getattr(config, "rms_norm_eps", 1e-6)  # another family may have another name for it
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        yield f"rms_norm_eps is {_shown(epsilon)}: must be a number between 0 and 1"
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        yield from _rope_number_problems(rope)


def _rope_number_problems(rope: dict[str, Any]) -> Iterator[str]:
    for key, value in rope.items():
        if isinstance(value, dict):  # by kind of layer
            yield from _rope_number_problems(value)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        wrong = [each for each in numbers if isinstance(each, bool) or not 0 < each < math.inf]
        if wrong and key not in _ROPE_SWITCHES:
            yield f"{_named(key)} of RoPE is {_shown(wrong[0])}: must be a positive, finite number"


def _value_problems(config: Any) -> Iterator[str]:
    for key in _SWITCHES:
        if not isinstance(value := getattr(config, key, None), bool | None):
            yield f"{key} is {_shown(value)}: must be true or false"
    if not isinstance(activation := getattr(config, "hidden_act", ""), str):
        yield f"hidden_act is {_shown(activation)}: must be a text"
    layer_types = getattr(config, "layer_types", None) or ()
    if other := [each for each in layer_types if each not in _LAYER_TYPES]:
        yield f"layer_types holds {_shown(other[0])}: only layers of full_attention are supported"
    if isinstance(config.rope_parameters, dict):
        yield from _rope_problems(config.rope_parameters)
    else:
        yield f"rope_parameters is {_shown(config.rope_parameters)}: must be a mapping"


def _rope_problems(rope: dict[str, Any]) -> Iterator[str]:
    if not isinstance(rope.get("rope_theta"), int | float):
        yield f"rope_theta is {_shown(rope.get('rope_theta'))}: must be a number"
    for key, value in rope.items():
        if isinstance(value, dict):
            yield f"{_named(key)} of RoPE is {_shown(value)}: layers that differ in RoPE are not supported"


def _named(key: str) -> str:
    """A key of the file in one line."""
    return key if key.isprintable() and key.strip() else _shown(key)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
