from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from longred_megatron.families import read_architecture
from longred_megatron.training.flops import forward_flops_per_token
from tests.checkpoint.small_models import write_model


@pytest.mark.parametrize("model", ["llama_3", "qwen3"])
def test_forward_flops_equal_torchs_count(model: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = write_model(model, tmp_path)
    architecture = read_architecture(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 32, dtype=torch.long))
    # The eager attention counts the whole square; a causal kernel computes half of it, and so do we.
    ours = 32 * forward_flops_per_token(architecture, architecture.num_layers, 2 * 32, head=True)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_fewer_layers_and_no_head_cost_less(tmp_path) -> None:  # type: ignore[no-untyped-def]
    architecture = read_architecture(write_model("llama_3", tmp_path))
    full = forward_flops_per_token(architecture, 2, 64, head=False)
    assert full == 2 * forward_flops_per_token(architecture, 1, 64, head=False)
    with_head = forward_flops_per_token(replace(architecture, vocab_size=1000), 0, 64, head=True)
    assert with_head == 2 * architecture.hidden_size * 1000
