"""The rule of every parameter of a model chunk: what Hugging Face tensors it is made of (`families.weights`)."""

import re
from collections.abc import Sequence

from longred_megatron.families import Architecture
from longred_megatron.families.weights import Rule
from longred_megatron.model.chunk import ModelChunk


def chunk_rules(chunk: ModelChunk, architecture: Architecture) -> dict[str, Rule]:
    """The rule of every parameter of `chunk`, by the parameter's name, with the model-wide layer numbers."""
    outer = _by_name(architecture.outer_rules(chunk.local_vocab_rows))
    numbers = [layer.layer_number for layer in chunk.decoder.layers]  # from 1
    layers = [_by_name(architecture.layer_rules(number - 1)) for number in numbers]
    rules = {}
    for name, _ in chunk.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        rules[name] = layers[int(match[1])][match[2]] if match else outer[name]
    return rules


def _by_name(rules: Sequence[Rule]) -> dict[str, Rule]:
    return {name: rule for rule in rules for name in rule.megatron}
