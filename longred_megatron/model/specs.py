"""Which Megatron modules a transformer block is made of: Transformer Engine's on a GPU, plain torch ones without."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from longred_megatron.model.attention import SdpaAttention, transformer_engine_attention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark Megatron reads to sum the weight's gradient over sequence-parallel ranks.

    With `layernorm_zero_centered_gamma`, as Transformer Engine's, it multiplies by 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        weight = 1 + self.weight.float()  # in bf16 the sum would lose the weight's digits
        return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm over one head's dims. Heads are split over tensor ranks with or without sequence parallelism,
    so each rank holds a part of the weight's gradient either way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


def block_submodules(
    config: TransformerConfig, num_layers: int, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The specification of `num_layers` layers and the final norm."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = transformer_engine_attention()
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
