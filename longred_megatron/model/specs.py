"""Which Megatron modules a transformer block is made of: Transformer Engine's on a GPU, plain torch ones without."""

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from longred_megatron.model.attention import SdpaAttention, transformer_engine_attention
from longred_megatron.model.plain_layers import HeadNorm, RMSNorm, SwiGlu


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
    layer.submodules.mlp.keywords["submodules"].activation_func = SwiGlu
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
