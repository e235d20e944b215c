"""Qwen3: queries and keys are normalised, head by head."""

from typing import Any

from longred_megatron.families.base import Biases, Family


class Qwen3(Family):
    model_type = "qwen3"
    qk_norm = True

    def biases(self, config: Any) -> Biases:
        attention = bool(config.attention_bias)
        return Biases(qkv=attention, attention_output=attention)
