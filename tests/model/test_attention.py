from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.extensions import transformer_engine
from torch import Tensor

from longred_megatron.layout import Parallel
from longred_megatron.model.attention import Documents, SdpaAttention, sequence_layout, transformer_engine_attention
from longred_megatron.parallel.context import cut_for_context_rank
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 16
CPU = torch.device("cpu")
# Of two sequences: one document in all pieces and documents that end inside and at the border of one; documents of one
# token, and one longer than a piece; borders where the pieces have theirs; no masks.
PACKS: list[Documents | None] = [
    [[5, 1, 2, 8], [16]],
    [[1] * 16, [1, 14, 1]],
    [[4, 4, 4, 4], [2, 12, 2]],
    None,
]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """[tokens, 1, heads, head_dim] -> [tokens, 1, heads x head_dim], with the whole mask, block-diagonal and causal."""
    lengths = torch.tensor([length for sequence in documents for length in sequence])
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
    visible = (numbers[:, None] == numbers) & torch.ones(len(numbers), len(numbers)).tril().bool()
    times = query.shape[2] // key.shape[2]
    q, k, v = (x[:, 0].transpose(0, 1) for x in (query, *(x.repeat_interleave(times, dim=2) for x in (key, value))))
    scores = (q @ k.transpose(1, 2) / query.shape[3] ** 0.5).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(numbers), 1, -1)


class PackedAttention(torch.nn.Module):
    """Stands for Transformer Engine's: its packed format as its documentation has it, in plain torch."""

    cp_comm_type = "p2p"

    def __init__(self, attention_type: str) -> None:
        super().__init__()
        assert attention_type == "cross"

    def set_context_parallel_group(self, *arguments: Any) -> None:
        assert arguments == (None, None, None, "p2p")
        self.switched_off = True

    def forward(self, *qkv: Tensor, qkv_format: str, attn_mask_type: str, **borders: Any) -> Tensor:
        assert self.switched_off and (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert all(x.is_contiguous() and x.dim() == 3 for x in qkv)
        assert all(borders[name].dtype == torch.int32 for name in ("cu_seqlens_q", "cu_seqlens_kv"))
        lengths = [borders[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_kv")]
        assert [borders["max_seqlen_q"], borders["max_seqlen_kv"]] == [max(each) for each in lengths[:2]]
        out = []
        for q, k, v in zip(*(x.split(each) for x, each in zip(qkv, lengths, strict=True)), strict=True):
            times = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(times, dim=1)) / HEAD_DIM**0.5
            hidden = ~torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(times, dim=1)))
        return torch.cat(out).flatten(1)


class MegatronWrapper(PackedAttention):
    def forward(self, *arguments: Any, **settings: Any) -> Tensor:
        raise AssertionError("Megatron's forward has no name for the mask")


def attend_on_context_ranks(join: Callable[[str], None], size: int) -> None:
    """What each rank runs: its pieces of every pack, output and gradients, against plain attention on all of them."""
    join("world")
    groups = initialize(Parallel(context=size), seed=1)
    sdpa = SdpaAttention(SimpleNamespace(kv_channels=HEAD_DIM), 1, None, "self")
    with patch.object(transformer_engine, "TEDotProductAttention", MegatronWrapper):
        packed = transformer_engine_attention()(attention_type="self")

    def cut(x: Tensor) -> Tensor:
        """[tokens, 1, ...], of all ranks -> of this one."""
        pieces = cut_for_context_rank(x.view(-1, LENGTH, *x.shape[2:]), groups.cp.rank(), size, whole_sequences=False)
        return pieces.reshape(-1, 1, *x.shape[2:])

    for documents in PACKS:
        torch.manual_seed(1)
        num_heads = (HEADS, KV_HEADS, KV_HEADS)
        whole = [torch.randn(2 * LENGTH, 1, heads, HEAD_DIM, requires_grad=True) for heads in num_heads]
        weight = torch.randn(2 * LENGTH, 1, HEADS * HEAD_DIM)
        expected = plain_attention(*whole, documents or [[LENGTH], [LENGTH]])
        gradients = torch.autograd.grad((expected * weight).sum(), whole)
        layout = sequence_layout(2, LENGTH, documents, CPU, cp_group=groups.cp)
        for attention in (sdpa, packed) if documents else (sdpa,):
            local = [cut(x.detach()).requires_grad_() for x in whole]
            out = attention(*local, None, attn_mask_type=None, packed_seq_params=layout)
            torch.testing.assert_close(out, cut(expected))
            ours = torch.autograd.grad((out * cut(weight)).sum(), local)
            for gradient, each in zip(ours, gradients, strict=True):
                torch.testing.assert_close(gradient, cut(each))
    destroy()


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_on_context_ranks_equal_the_whole_mask_on_one(size: int) -> None:
    run_ranks(attend_on_context_ranks, size, size)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_causal_attention_within_each_sequence(kv_heads: int, dtype: torch.dtype) -> None:
    num_sequences, length, heads, head_dim = 3, 5, 4, 8
    tokens, scale = num_sequences * length, 0.2
    query = torch.randn(tokens, 1, heads, head_dim, dtype=dtype)
    key, value = (torch.randn(tokens, 1, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    attention = SdpaAttention(SimpleNamespace(kv_channels=head_dim), 1, None, "self", softmax_scale=scale)
    out = attention(query, key, value, None, packed_seq_params=sequence_layout(num_sequences, length, None, CPU))
    assert out.shape == (tokens, 1, heads * head_dim) and out.dtype == dtype

    same = torch.arange(tokens) // length
    visible = (same[:, None] == same) & torch.ones(tokens, tokens).tril().bool()
    for head in range(heads):
        group = head * kv_heads // heads
        q, k, v = query[:, 0, head].float(), key[:, 0, group].float(), value[:, 0, group].float()
        weights = (q @ k.T * scale).masked_fill(~visible, float("-inf")).softmax(-1)
        expected = (weights @ v).to(dtype)
        torch.testing.assert_close(out[:, 0].view(tokens, heads, head_dim)[:, head], expected)


@pytest.mark.parametrize("documents", PACKS[:-1])
def test_documents_of_any_lengths_see_only_themselves(documents: Documents) -> None:
    qkv = [torch.randn(32, 1, heads, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    attention = SdpaAttention(SimpleNamespace(kv_channels=HEAD_DIM), 1, None, "self")
    out = attention(*qkv, None, packed_seq_params=sequence_layout(2, LENGTH, documents, CPU))
    expected = plain_attention(*qkv, documents)
    torch.testing.assert_close(out, expected)
    gradients, wanted = (torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected))
    for gradient, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, each)


def test_transformer_engine_is_told_the_borders_and_megatron_is_not() -> None:
    layout = sequence_layout(2, 8, [[5, 1, 2], [8]], CPU)
    assert layout.cu_seqlens_q.tolist() == layout.cu_seqlens_kv.tolist() == [0, 5, 6, 8, 16]
    assert layout.cu_seqlens_q.dtype == torch.int32 and layout.max_seqlen_q == layout.max_seqlen_kv == 8
    assert layout.key_index is None
    assert layout.qkv_format == "bshd"  # from "thd", Megatron would take RoPE's positions from the borders


def test_a_context_rank_selects_the_keys_of_its_pieces_of_documents() -> None:
    rank = SimpleNamespace(rank=lambda: 1, size=lambda: 2)  # of 8 tokens: 2 to 3, and 4 to 5
    layout = sequence_layout(2, 8, [[5, 1, 2], [3, 5]], CPU, cp_group=rank)
    # First sequence: queries 2 3 | 4 and 5; second: queries 2 and 3 | 4 5, of keys counted from its first token, 8.
    assert layout.num_queries == [2, 1, 1, 1, 1, 2]
    assert layout.num_keys == [4, 5, 1, 3, 1, 3]
    assert layout.key_index.tolist() == [0, 1, 2, 3, *range(5), 5, 8, 9, 10, 11, 11, 12, 13]
    assert layout.cu_seqlens_q.tolist() == [0, 2, 3, 4, 5, 6, 8]
    assert layout.cu_seqlens_kv.tolist() == [0, 4, 9, 10, 13, 14, 17]
    assert (layout.max_seqlen_q, layout.max_seqlen_kv) == (2, 5)
