"""What an analysis holds, by the length of a text."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longred_megatron.analysis.measure import Subject, measure_drift
from longred_megatron.analysis.walk import open_network, other_rotary
from tests.planning.live_tensors import LiveTensors

HIDDEN, HEAD_DIM, KV_HEADS, SHORT, LONG = 128, 32, 2, 2048, 8192


def test_it_grows_by_one_layers_hidden_states_keys_and_values(tmp_path: Path) -> None:
    """Not by all heads' queries, the MLP's inner values (8 times the hidden states here), logits or [s, s] scores."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=8 * HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, vocab_size=1000, max_position_embeddings=LONG,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    network = open_network(tmp_path, torch.float32, torch.device("cpu"))
    extended = Subject(network, other_rotary(network, network.config.rope_parameters | {"rope_theta": 1e6}))
    peaks = []
    for length in (SHORT, LONG):
        tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))
        with LiveTensors() as live:
            measure_drift(tokens, Subject(network), [extended])
        peaks.append(live.peak)
    states = 4 * (HIDDEN + 2 * KV_HEADS * HEAD_DIM)
    tables, mask = 2 * 4 * HEAD_DIM, 4 * 512
    grown = (peaks[1] - peaks[0]) / (LONG - SHORT)
    print(f"{grown:.0f} bytes a token; states {2 * states}, cosines and sines {2 * tables}, a mask {mask}")
    assert 2 * states <= grown <= 1.1 * 2 * (states + tables) + 1.1 * mask
