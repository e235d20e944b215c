from types import SimpleNamespace

import pytest
import torch

from longred_megatron.model.attention import SdpaAttention, SequenceLayout, sequence_layout


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_causal_attention_within_each_sequence(kv_heads: int, dtype: torch.dtype) -> None:
    num_sequences, length, heads, head_dim = 3, 5, 4, 8
    tokens, scale = num_sequences * length, 0.2
    query = torch.randn(tokens, 1, heads, head_dim, dtype=dtype)
    key, value = (torch.randn(tokens, 1, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    attention = SdpaAttention(SimpleNamespace(kv_channels=head_dim), 1, None, "self", softmax_scale=scale)
    out = attention(query, key, value, None, packed_seq_params=SequenceLayout(num_sequences=num_sequences))
    assert out.shape == (tokens, 1, heads * head_dim) and out.dtype == dtype

    same = torch.arange(tokens) // length
    visible = (same[:, None] == same) & torch.ones(tokens, tokens).tril().bool()
    for head in range(heads):
        group = head * kv_heads // heads
        q, k, v = query[:, 0, head].float(), key[:, 0, group].float(), value[:, 0, group].float()
        weights = (q @ k.T * scale).masked_fill(~visible, float("-inf")).softmax(-1)
        expected = (weights @ v).to(dtype)
        torch.testing.assert_close(out[:, 0].view(tokens, heads, head_dim)[:, head], expected)


def test_documents_of_any_lengths_see_only_themselves() -> None:
    heads, kv_heads, head_dim, documents = 4, 2, 8, [[5, 1, 2], [8]]
    query = torch.randn(16, 1, heads, head_dim, requires_grad=True)
    key, value = (torch.randn(16, 1, kv_heads, head_dim, requires_grad=True) for _ in range(2))
    attention = SdpaAttention(SimpleNamespace(kv_channels=head_dim), 1, None, "self")
    layout = sequence_layout(2, documents, torch.device("cpu"))
    out = attention(query, key, value, None, packed_seq_params=layout)

    numbers = torch.tensor([0] * 5 + [1] + [2] * 2 + [3] * 8)
    visible = (numbers[:, None] == numbers) & torch.ones(16, 16).tril().bool()
    q, k, v = (x[:, 0].transpose(0, 1) for x in (query, *(x.repeat_interleave(2, dim=2) for x in (key, value))))
    scores = (q @ k.transpose(1, 2) / head_dim**0.5).masked_fill(~visible, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(0, 1).reshape(16, 1, -1)
    torch.testing.assert_close(out, expected)
    gradients, wanted = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (out, expected))
    for gradient, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, each)


def test_transformer_engine_is_told_the_borders_and_megatron_is_not() -> None:
    layout = sequence_layout(2, [[5, 1, 2], [8]], torch.device("cpu"))
    assert layout.cu_seqlens_q.tolist() == layout.cu_seqlens_kv.tolist() == [0, 5, 6, 8, 16]
    assert layout.cu_seqlens_q.dtype == torch.int32 and layout.max_seqlen_q == layout.max_seqlen_kv == 8
    assert layout.qkv_format == "bshd"  # from "thd", Megatron would take RoPE's positions from the borders
