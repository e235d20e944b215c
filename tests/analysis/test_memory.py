"""What an analysis holds: no more for long texts than for short ones, for many than for few, or for deep models."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longred_megatron.analysis.measure import Ranks, Subject, measure_drift
from longred_megatron.analysis.network import Network
from longred_megatron.analysis.perturbation import copy_differences
from longred_megatron.analysis.positional_vectors import positional_vectors
from longred_megatron.analysis.query_states import state_changes
from longred_megatron.errors import UserError
from tests.planning.live_tensors import LiveTensors

HIDDEN, LENGTH, VOCABULARY = 64, 2048, 500
BAR = SimpleNamespace(update=lambda: None)


def network(folder: Path, layers: int = 2) -> Network:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=8 * HIDDEN, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Network(folder, torch.float32, torch.device("cpu"))


def peak(study: str, of: Network, texts: int = 1, length: int = LENGTH) -> int:
    """Bytes of tensors at one time, but for the texts themselves."""
    tokens = torch.randint(0, VOCABULARY, (texts, length), generator=torch.Generator().manual_seed(0))
    subject, other = Subject(of), Subject(of, of.rotary(of.config.rope_parameters | {"rope_theta": 1e6}))
    with torch.inference_mode(), LiveTensors() as live:
        if study == "drift":
            measure_drift(tokens, subject, [other])
        elif study == "positional-vectors":
            positional_vectors(subject, tokens, torch.arange(0, length + 1, length // 64), Ranks(), BAR)
        elif study == "perturbation":
            copy_differences(subject, tokens[:, : length // 4], 4, 7, Ranks(), BAR)
        else:
            state_changes(subject, other, tokens, Ranks(), BAR)
    return live.peak


@pytest.mark.parametrize("study", ["drift", "positional-vectors", "perturbation", "query-states"])
def test_it_does_not_grow_with_the_text(study: str, tmp_path: Path) -> None:
    """But for a few numbers a token: token ids, positions, and to which point a position belongs."""
    model = network(tmp_path)
    grown = (peak(study, model, length=4 * LENGTH) - peak(study, model)) / (3 * LENGTH)
    print(f"{study}: {grown:.1f} bytes a token; a hidden state has {4 * HIDDEN}")
    assert grown <= 40


def test_it_does_not_grow_with_the_number_of_texts(tmp_path: Path) -> None:
    model = network(tmp_path)
    two, eight = (peak("drift", model, texts) for texts in (2, 8))
    assert eight <= two + 6 * (8 * LENGTH + 100)  # token ids, and a few sums


def test_it_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    short, deep = (peak("drift", network(tmp_path / str(layers), layers)) for layers in (2, 16))
    assert deep <= short + 14 * 200


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    model, limits = network(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot keep the texts' hidden states .*; set TMPDIR"):
            peak("drift", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
