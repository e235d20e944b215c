"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from typing import Any

from longred_megatron.families.base import Biases, Family


class Qwen2(Family):
    model_type = "qwen2"

    def biases(self, config: Any) -> Biases:
        return Biases(qkv=True)
