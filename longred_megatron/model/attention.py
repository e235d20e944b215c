"""Attention over equal-length sequences that lie end to end in one flat [tokens, 1, hidden] micro-batch.

Each may be a pack of documents of any lengths that do not see each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from longred_megatron.model.plain_layers import Rotation
from longred_megatron.parallel.context import gather_sequences, pieces

LONG_QUERIES, WIDE_HEAD = 1024, 64  # from here on attention runs in bf16 where the model does, see `SdpaAttention`

Documents = Sequence[Sequence[int]]
"""The lengths of each sequence's documents, in order; they add up to the sequence's length."""


@dataclass
class SequenceLayout(PackedSeqParams):
    """How a micro-batch's tokens are cut into sequences, and which keys each query sees.

    Travels with the micro-batch through Megatron's `packed_seq_params` argument: attention may run again during the
    backward pass of another micro-batch's turn, so nothing of this may be kept in a module. With context parallelism,
    Megatron's `cp_group` is the group that shares each sequence, or `local_cp_size` is 1 where ranks hold whole ones.

    A row is a sequence; or all tokens end to end, where documents are masked and so each sequence is cut otherwise.
    Its tokens on this rank are cut into spans: the last query of a span sees all its keys, each one before a key less.

    num_sequences: equally long ones.
    masked: whether a token sees only its own document.
    num_queries, num_keys: of each span of a row, in the order of its tokens.
    key_index: int64, where in a row the keys of all spans are, if context ranks share it. Otherwise spans have the
        keys that they have queries of.
    rotation: RoPE of this rank's tokens, where attention itself turns queries and keys; None: they come turned.
    """

    qkv_format: str = "bshd"
    num_sequences: int = 1
    masked: bool = False
    num_queries: list[int] = field(default_factory=list)
    num_keys: list[int] = field(default_factory=list)
    key_index: Tensor | None = None
    rotation: Rotation | None = None

    def rows(self, x: Tensor) -> Tensor:
        """[tokens, 1, ...] or [sequences, sequence_length, ...] -> [rows, row length, ...]."""
        return x.reshape(1 if self.masked else self.num_sequences, -1, *x.shape[2:])

    def turned(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries or keys [tokens, 1, heads, head_dim] as attention takes them."""
        return x.to(dtype) if self.rotation is None else self.rotation.turn(x, dtype)

    def keys(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """This rank's [tokens, 1, kv_heads, head_dim] each -> [rows, keys of all spans, kv_heads, head_dim] each.

        Keys and values of all context ranks come in one message; their gradients return in one, summed.
        """
        if self.key_index is None:
            return [self.rows(x) for x in (key, value)]
        gathered = gather_sequences(torch.stack((key, value), dim=2), self.num_sequences, self.cp_group)
        return [self.rows(x).index_select(1, self.key_index) for x in gathered.unbind(2)]


def sequence_layout(
    num_sequences: int,
    sequence_length: int,
    documents: Documents | None,
    device: torch.device,
    cp_group: torch.distributed.ProcessGroup | None = None,
    local_cp_size: int | None = None,
) -> SequenceLayout:
    """The layout of equally long sequences, with Transformer Engine's borders where documents see only themselves.

    The format stays `bshd`: from `thd`, Megatron would take RoPE's positions from the borders. Attention changes it.

    Args:
        num_sequences, sequence_length: of the whole sequences that this rank holds, or holds pieces of.
        documents: of each of these sequences, also whole.
        cp_group: the context ranks that share each sequence.
    """
    parts = [(0, sequence_length)]
    if cp_group is not None:
        parts = pieces(sequence_length, cp_group.rank(), cp_group.size())
    spans = list(_spans(documents or [[sequence_length]], parts))
    layout = SequenceLayout(
        num_sequences=num_sequences,
        masked=documents is not None,
        num_queries=[stop - start for _, start, stop in spans],
        num_keys=[stop - first for first, _, stop in spans],
        cp_group=cp_group,
        local_cp_size=local_cp_size,
    )
    if cp_group is not None:
        layout.key_index = _key_index([first for first, _, _ in spans], layout.num_keys, device)
    if layout.masked:
        layout.cu_seqlens_q, layout.cu_seqlens_kv = (_borders(x, device) for x in (layout.num_queries, layout.num_keys))
        layout.max_seqlen_q, layout.max_seqlen_kv = max(layout.num_queries), max(layout.num_keys)
    return layout


def _spans(documents: Documents, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, stop of both) of each document's overlap with each part (start, stop) of its sequence.

    In the order of the tokens: sequence by sequence, part by part. Counted from the first sequence's first token.
    """
    offset = 0
    for lengths in documents:
        borders = list(accumulate(lengths, initial=offset))
        for start, stop in parts:
            for first, last in pairwise(borders):
                query, end = max(first, offset + start), min(last, offset + stop)
                if query < end:
                    yield first, query, end
        offset = borders[-1]


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def _key_index(first_keys: Sequence[int], num_keys: Sequence[int], device: torch.device) -> Tensor:
    """The numbers first_keys[i] ... first_keys[i] + num_keys[i] - 1 of each span i, one span after the other.

    Made on the device out of two numbers a span: the host would have to wait for a copy of all of them.
    """
    before = accumulate(num_keys[:-1], initial=0)
    shifts = [first - skipped for first, skipped in zip(first_keys, before, strict=True)]
    shift, repeats = torch.tensor([shifts, list(num_keys)]).to(device, non_blocking=True)
    total = sum(num_keys)
    return torch.arange(total, device=device) + shift.repeat_interleave(repeats, output_size=total)


class SdpaAttention(torch.nn.Module):
    """RoPE and causal attention by torch's scaled_dot_product_attention: Megatron's core attention without a GPU.

    In fp32, but for long sequences of wide heads. Forward and backward, torch's bf16 CPU kernel takes 1.2 to 5 times
    as long with heads of 16 or 32 dims or at up to 512 tokens (on CPUs with AMX and with AVX-512 BF16), and 0.87 times
    with heads of 64 dims at 2,048 tokens (AVX-512 BF16), conversions counted.
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
        layout = packed_seq_params
        is_long = max(layout.num_queries) >= LONG_QUERIES and query.shape[-1] >= WIDE_HEAD
        dtype = query.dtype if is_long else torch.promote_types(query.dtype, torch.float32)
        # Where context ranks share them, keys travel in their own dtype.
        key = layout.turned(key, dtype if layout.key_index is None else key.dtype)
        # Copied: as a view it would hold the product that queries and keys were cut from.
        value = value.contiguous()
        keys, values = (x.to(dtype).split(layout.num_keys, dim=1) for x in layout.keys(key, value))
        queries = layout.rows(layout.turned(query, dtype)).split(layout.num_queries, dim=1)
        # Span by span: no work is spent on pairs of tokens of different documents.
        spans = [self._attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
        out = spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)
        return out.reshape(query.shape[0], 1, -1).to(query.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, queries or keys, heads or kv_heads, head_dim] each; the queries are the last keys' tokens."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
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
        def __init__(self, *arguments: Any, attention_type: str, **settings: Any) -> None:
            # Keys have borders of their own. Told "self", Transformer Engine's unfused backend would take the queries'.
            super().__init__(*arguments, attention_type="cross", **settings)

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
            layout = packed_seq_params
            if layout.masked and layout.cp_group is not None:
                out = self._attend_across(query, key, value, layout)
            else:
                inputs = [layout.rows(x) for x in (query, key, value)]
                if layout.masked:
                    layout, inputs = replace(layout, qkv_format="thd"), [x.squeeze(0) for x in inputs]
                out = super().forward(*inputs, attention_mask, attn_mask_type, attention_bias, layout, num_splits)
            return out.reshape(query.shape[0], 1, -1)

        def _attend_across(self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
            """This rank's pieces of documents against the keys of all context ranks.

            Transformer Engine's own context parallelism is switched off for it: its ring takes only documents whose
            length is a multiple of 2 x size. Its `forward` is called, not Megatron's, which hands on masks by the
            names of Megatron's `AttnMaskType`; that lacks the packed format's causal mask aligned at the end.
            """
            keys, values = layout.keys(key, value)
            self.set_context_parallel_group(None, None, None, self.cp_comm_type)
            return super(TEDotProductAttention, self).forward(
                query.squeeze(1),
                keys.squeeze(0),
                values.squeeze(0),
                qkv_format="thd",
                cu_seqlens_q=layout.cu_seqlens_q,
                cu_seqlens_kv=layout.cu_seqlens_kv,
                max_seqlen_q=layout.max_seqlen_q,
                max_seqlen_kv=layout.max_seqlen_kv,
                attn_mask_type="padding_causal_bottom_right",
            )

    return FlatTEDotProductAttention
