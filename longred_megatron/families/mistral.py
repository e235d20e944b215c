"""Mistral, without its sliding window."""

from typing import Any

from longred_megatron.families.base import Family


class Mistral(Family):
    model_type = "mistral"

    def limits_attention(self, config: Any) -> bool:
        return config.sliding_window is not None
