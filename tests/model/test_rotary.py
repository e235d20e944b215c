import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from longred_megatron.model.rotary import rotary_table
from longred_megatron.rope.frequencies import inverse_frequencies


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [0, 1, 500, 8191], [131071, 7, 7, 0]])
def test_rotation_equals_transformers_at_any_positions(positions: list[int]) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    ids, x = torch.tensor([positions]), torch.randn(4, 1, 4, 16)
    frequencies, _ = inverse_frequencies(rope, 16, 131072)
    ours = _apply_rotary_pos_emb_bshd(x, rotary_table(ids, frequencies))
    cos, sin = LlamaRotaryEmbedding(config)(x, ids)
    theirs, _ = apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)
    torch.testing.assert_close(ours.permute(1, 2, 0, 3), theirs, rtol=1e-5, atol=1e-5)
