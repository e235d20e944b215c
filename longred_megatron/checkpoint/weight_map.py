"""The rule of every parameter of a stage: which Hugging Face tensors it is made of, and how (`families.weights`)."""

import re
from collections.abc import Sequence

from longred_megatron.families import Architecture
from longred_megatron.families.weights import Rule
from longred_megatron.model.stage import Stage


def stage_rules(stage: Stage, architecture: Architecture) -> dict[str, Rule]:
    """The rule of every parameter of `stage`, by the parameter's name, with the model-wide layer numbers."""
    outer = _by_name(architecture.outer_rules(stage.local_vocab_rows))
    numbers = [layer.layer_number for layer in stage.decoder.layers]  # from 1
    layers = [_by_name(architecture.layer_rules(number - 1)) for number in numbers]
    rules = {}
    for name, _ in stage.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        rules[name] = layers[int(match[1])][match[2]] if match else outer[name]
    return rules


def _by_name(rules: Sequence[Rule]) -> dict[str, Rule]:
    return {name: rule for rule in rules for name in rule.megatron}
