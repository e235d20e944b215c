from types import SimpleNamespace

import pytest
import torch

from longred_megatron.model.attention import SdpaAttention, SequenceLayout


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
