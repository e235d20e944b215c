"""Attention over equal-length sequences that lie end to end in one flat [tokens, 1, hidden] micro-batch.

Each may be a pack of documents of any lengths that do not see each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

Documents = Sequence[Sequence[int]]
"""The lengths of each sequence's documents, in order; they add up to the sequence's length."""


@dataclass
class SequenceLayout(PackedSeqParams):
    """How a micro-batch's tokens are cut into sequences.

    Travels with the micro-batch through Megatron's `packed_seq_params` argument: attention may run again during the
    backward pass of another micro-batch's turn, so nothing of this may be kept in a module. With context parallelism,
    Megatron's `cp_group` is the group that shares each sequence, or `local_cp_size` is 1 where ranks hold whole ones.
    Where tokens see only their own document, `document_lengths` has the lengths of all, in the order of the tokens.
    """

    qkv_format: str = "bshd"
    num_sequences: int = 1
    document_lengths: list[int] | None = None


def sequence_layout(
    num_sequences: int, documents: Documents | None, device: torch.device, **context: Any
) -> SequenceLayout:
    """The layout of `num_sequences` equally long sequences, with Transformer Engine's borders of their documents.

    The format stays `bshd`: from `thd`, Megatron would take RoPE's positions from the borders. Attention changes it.
    """
    if documents is None:
        return SequenceLayout(num_sequences=num_sequences, **context)
    lengths = [length for sequence in documents for length in sequence]
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    return SequenceLayout(
        num_sequences=num_sequences,
        document_lengths=lengths,
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        **context,
    )


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
        assert packed_seq_params is not None
        group, lengths = packed_seq_params.cp_group, packed_seq_params.document_lengths
        if lengths is not None:
            out = self._attend_by_document(query, key, value, lengths)
        elif group is None:
            out = self._attend(*(_by_sequence(x, packed_seq_params) for x in (query, key, value)))
        else:
            out = self._attend_across(query, key, value, packed_seq_params, group)
        return out.reshape(query.shape[0], 1, -1).to(query.dtype)

    def _attend_by_document(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Each document alone: no work is spent on pairs of tokens that do not see each other."""
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in parts], dim=1)

    def _attend_across(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SequenceLayout,
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        """This rank's two pieces of every sequence (`parallel.context`) against all the keys before them.

        Keys and values of all ranks travel in one message; their gradients return in one, summed.
        """
        size, rank = group.size(), group.rank()
        gathered = gather_from_sequence_parallel_region(torch.stack((key, value), dim=2), group=group)
        # [ranks, sequences, first or second piece, piece length, 1, keys or values, heads, head_dim]
        pieces = gathered.view(size, layout.num_sequences, 2, -1, *gathered.shape[1:])
        in_order = torch.cat((pieces[:, :, 0], pieces[:, :, 1].flip(0)))  # [2 x ranks, sequences, ...]
        keys, values = in_order.transpose(0, 1).flatten(1, 3).unbind(2)
        first, second = _by_sequence(query, layout).chunk(2, dim=1)
        length = first.shape[1]
        out = [
            self._attend(q, keys[:, :end], values[:, :end])
            for q, end in ((first, (rank + 1) * length), (second, (2 * size - rank) * length))
        ]
        return torch.cat(out, dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[sequences, queries or keys, heads or kv_heads, head_dim] each; the queries are the last keys' tokens."""
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        num_queries, num_keys = q.shape[2], k.shape[2]
        mask = None
        if num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2)


def transformer_engine_attention() -> type:
    """The same on a GPU: Transformer Engine's attention, fed [sequences, sequence_length, heads, head_dim] views, or
    [tokens, heads, head_dim] and the documents' borders in its packed format (`thd`)."""
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
            layout, qkv = packed_seq_params, (query, key, value)
            if layout.document_lengths is None:
                inputs = [_by_sequence(x, layout) for x in qkv]
            else:
                layout, inputs = replace(layout, qkv_format="thd"), [x.squeeze(1) for x in qkv]
            out = super().forward(*inputs, attention_mask, attn_mask_type, attention_bias, layout, num_splits)
            return out.reshape(query.shape[0], 1, -1)

    return FlatTEDotProductAttention
