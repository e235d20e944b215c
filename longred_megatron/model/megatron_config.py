"""The project's Architecture and recipe, said in Megatron's TransformerConfig."""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from longred_megatron.device import on_gpu
from longred_megatron.dtypes import DTYPES
from longred_megatron.families import Architecture
from longred_megatron.layout import Parallel
from longred_megatron.precision import Precision


def transformer_config(
    architecture: Architecture,
    parallel: Parallel,
    precision: Precision,
    *,
    recompute: str = "none",
    attention_factor: float = 1.0,
) -> TransformerConfig:
    """Args:
    attention_factor: what some kinds of RoPE multiply rotated queries and keys by. Their product carries its square,
        which is applied to the softmax scale instead: the same numbers, since every dim of a head is rotated.
    """
    gpu = on_gpu()
    dtype = DTYPES[precision.params]
    settings: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.intermediate_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.norm_epsilon,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "pipeline_dtype": dtype,
        "perform_initialization": False,  # weights always come from a Hugging Face folder or a checkpoint
        "use_cpu_initialization": not gpu,
        "deallocate_pipeline_outputs": True,
        "gradient_accumulation_fusion": gpu and _has_fused_weight_gradient(),
        "bias_activation_fusion": gpu,
        "bias_dropout_fusion": gpu,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": gpu,
    }
    settings |= architecture.megatron_settings() | precision.megatron_settings() | _layout_settings(parallel)
    if gpu:
        # By default, Transformer Engine takes unfused attention where no other fits, with all of a layer's scores.
        settings["attention_backend"] = AttnBackend.fused
    settings["softmax_scale"] *= attention_factor**2
    # Not Transformer Engine's: the module in that place is `plain_layers.SwiGlu`.
    settings["use_te_activation_func"] = not gpu and settings["activation_func"] is silu
    if recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        # Not Megatron's default, the attention: fused kernels keep no scores, so that would cost time and save nothing.
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return TransformerConfig(**settings)


def _layout_settings(parallel: Parallel) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "tp_comm_overlap": parallel.tp_comm_overlap,
    }
    if parallel.layers_per_chunk:
        chunks = [["decoder"] * size for size in parallel.layers_per_chunk]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = chunks
    if parallel.virtual_pipeline:
        # With two stages both neighbours are the same rank; batched messages would be swapped without an error.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _has_fused_weight_gradient() -> bool:
    """Megatron's own linear layers (embedding head) need NVIDIA apex for weight gradients added in place."""
    from importlib.util import find_spec

    return find_spec("fused_weight_gradient_mlp_cuda") is not None
