"""Attention over equal-length sequences that lie end to end in one flat [tokens, 1, hidden] micro-batch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class SequenceLayout(PackedSeqParams):
    """How a micro-batch's tokens are cut into sequences.

    Travels with the micro-batch through Megatron's `packed_seq_params` argument: attention may run again during the
    backward pass of another micro-batch's turn, so nothing of this may be kept in a module. With context parallelism,
    Megatron's `cp_group` is the group that shares each sequence, or `local_cp_size` is 1 where ranks hold whole ones.
    """

    qkv_format: str = "bshd"
    num_sequences: int = 1


def _by_sequence(x: Tensor, layout: SequenceLayout) -> Tensor:
    """[tokens, 1, heads, head_dim] -> [sequences, sequence_length, heads, head_dim], a view."""
    return x.view(layout.num_sequences, -1, *x.shape[2:])


class SdpaAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention: Megatron's core attention where there is no GPU.

    Computed in fp32: torch's bf16 CPU kernel takes 1.5 to 5 times as long with heads of 16 or 32 dims at up to 512
    tokens, and as long with larger ones (measured forward and backward on a CPU with AMX).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceLayout | None = None,
    ) -> Tensor:
        """[tokens, 1, heads or kv_heads, head_dim] each -> [tokens, 1, heads x head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.cp_group is None  # see train.py
        # [sequences, heads, sequence_length, head_dim]
        q, k, v = (_by_sequence(x, packed_seq_params).transpose(1, 2).float() for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(query.shape[0], 1, -1).to(query.dtype)


def transformer_engine_attention() -> type:
    """The same on a GPU: Transformer Engine's attention, fed [sequences, sequence_length, heads, head_dim] views."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class FlatTEDotProductAttention(TEDotProductAttention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any,
            attention_bias: Tensor | None = None,
            packed_seq_params: SequenceLayout | None = None,
            num_splits: int | None = None,
        ) -> Tensor:
            assert packed_seq_params is not None
            out = super().forward(
                *(_by_sequence(x, packed_seq_params) for x in (query, key, value)),
                attention_mask,
                attn_mask_type,
                attention_bias,
                packed_seq_params,
                num_splits,
            )
            return out.reshape(query.shape[0], 1, -1)

    return FlatTEDotProductAttention
