"""Llama 2, 3 and 3.x, and the many models that took over their code."""

from typing import Any

from longred_megatron.families.base import Biases, Family


class Llama(Family):
    model_type = "llama"

    def biases(self, config: Any) -> Biases:
        attention = bool(config.attention_bias)
        return Biases(qkv=attention, attention_output=attention, mlp=bool(config.mlp_bias))
