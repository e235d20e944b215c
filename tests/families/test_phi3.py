"""What of Phi-3's models is read, and what is refused. The rest is tested as every family's."""

import json
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.errors import UserError
from longred_megatron.families import Architecture, read_architecture

# microsoft/phi-4's config.json, 14B; https://huggingface.co/microsoft/phi-4
PHI_4: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {},
    "bos_token_id": 100257,
    "embd_pdrop": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "model_type": "phi3",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100257,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def read(folder: Path, **changes: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(PHI_4 | changes))
    return read_architecture(folder)


def test_phi_4_is_read(tmp_path: Path) -> None:
    architecture = read(tmp_path)
    assert architecture.num_parameters() == 14_659_507_200  # "14.7B"
    assert (architecture.head_dim, architecture.num_kv_heads, architecture.rope["rope_theta"]) == (128, 10, 250000)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sliding_window": 2047}, "sliding_window 2047 limits attention"),  # Phi-3-mini-4k
        ({"rope_scaling": LONGROPE}, "rope_type 'longrope' is not supported; supported are default"),  # 128k
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor must be 1"),  # Phi-4-mini
    ],
)
def test_what_the_smaller_models_have_is_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, **changes)
    [found] = caught.value.problems
    assert found.startswith(f"{tmp_path / 'config.json'}: {problem}")
