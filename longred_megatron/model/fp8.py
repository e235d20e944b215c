"""The scales that Transformer Engine keeps for FP8 with delayed scaling, and of FP8 attention, as tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from longred_megatron.device import on_gpu
from longred_megatron.model.chunk import ModelChunk


def sharded_scales(chunks: Sequence[ModelChunk]) -> dict[str, ShardedTensor]:
    """The chunks' scales and the maxima that they are made from, for a checkpoint to save or to load into.

    Transformer Engine's own form is a pickle that it refuses to load. Named by the layer's number: all ranks of a stage
    hold the same numbers, since the maxima are reduced over its tensor, data and context ranks. Empty where no module
    keeps any.
    """
    found = {}
    for chunk in chunks:
        replica = (0, chunk.pg_collection.tp.rank(), chunk.pg_collection.dp_cp.rank())
        for name, tensor in _scales(chunk):
            key = f"fp8.{name}"
            found[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
    return found


def forget_models() -> None:
    """Transformer Engine keeps the scales of every model it has seen, and reduces them with those of the next one; and
    its Userbuffers."""
    if on_gpu():
        from transformer_engine.pytorch import destroy_ub
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
        destroy_ub()


def _scales(chunk: ModelChunk) -> Iterator[tuple[str, Tensor]]:
    if not chunk.config.fp8:
        return
    # A module has its tensors from its first forward pass on, and a new one is to be loaded into before.
    with torch.no_grad(), get_fp8_context(chunk.config):  # with gradients, to leave the context would move the scales
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if not hasattr(module, "init_fp8_metadata"):
                    continue
                module.init_fp8_metadata(num_gemms=_num_gemms(module))
                for direction in ("scaling_fwd", "scaling_bwd"):
                    state: Any = module.fp8_meta.get(direction)
                    for what in ("scale", "amax_history"):
                        if isinstance(tensor := getattr(state, what, None), Tensor):
                            yield f"layers.{layer.layer_number}.{name}.{direction}.{what}", tensor


def _num_gemms(module: torch.nn.Module) -> int:
    """As its forward pass says: three sets of scales for attention, one for a linear layer."""
    from transformer_engine.pytorch import DotProductAttention

    return 3 if isinstance(module, DotProductAttention) else 1
