"""Phi-3's architecture, with RoPE that is neither scaled nor partial: Phi-4 (14B) and its kin.

Query, key and value are one tensor, gate and up another.
"""

from typing import Any

from longred_megatron.families.base import Family


class Phi3(Family):
    model_type = "phi3"
    qkv = ("self_attn.qkv_proj",)
    gate_up = ("mlp.gate_up_proj",)

    def rope_types(self) -> tuple[str, ...]:
        return ("default",)  # transformers refuses others or, given YaRN, makes LongRoPE of it

    def limits_attention(self, config: Any) -> bool:
        return config.sliding_window is not None
