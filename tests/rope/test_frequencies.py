import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longred_megatron.rope.frequencies import RotaryFrequencies, inverse_frequencies, rope_types, same_frequencies

WINDOW = 131072
DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1.0e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The window agrees with every factor as far as transformers checks it.
ROPES = {
    "default": DEFAULT,
    "default of a small base": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {**DEFAULT, "rope_type": "linear", "factor": 4.0},
    "linear, odd factor": {**DEFAULT, "rope_type": "linear", "factor": 3.7},
    "proportional": {**DEFAULT, "rope_type": "proportional"},
    "llama3": LLAMA3,
    "llama3, other settings": {**LLAMA3, "factor": 32.0, "high_freq_factor": 3.0, "rope_theta": 2.0e7},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.25},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "factor": 5.5},
    "yarn, equal betas": {**YARN, "beta_fast": 8, "beta_slow": 8, "truncate": False},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "yarn, ramp past the last pair": {
        **YARN,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 1000000,
        "beta_fast": 1.0e5,
    },
    "yarn, ramp of no width": {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 6},
    "yarn, tiny window": {**YARN, "original_max_position_embeddings": 64, "rope_theta": 100.0},
    "dynamic": {**DEFAULT, "rope_type": "dynamic", "factor": 3.7},
    "dynamic, a factor that fp32 rounds": {**DEFAULT, "rope_type": "dynamic", "factor": 1.3},
    "dynamic, factor 1": {**DEFAULT, "rope_type": "dynamic", "factor": 1.0},
}


def longrope(head_dim: int, **settings: float) -> dict:
    pairs = range(head_dim // 2)
    factors = {"short_factor": [1 + 0.01 * i for i in pairs], "long_factor": [1.1 + i for i in pairs]}
    return {**DEFAULT, "rope_type": "longrope", "original_max_position_embeddings": 8192, **factors, **settings}


def rotary_module(rope: dict, head_dim: int, length: int | None = None) -> LlamaRotaryEmbedding:
    """transformers', after a forward call on positions up to `length` - 1. It remembers: one for each call."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=WINDOW,
        rope_parameters=dict(rope),
    )
    module = LlamaRotaryEmbedding(config)
    if length is not None:
        module(torch.zeros(1), torch.tensor([[3, length - 1, 0]]))
    return module


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_frequencies_equal_those_of_transformers_bitwise(rope, head_dim):
    module = rotary_module(rope, head_dim)
    if rope["rope_type"] == "default":
        expected, expected_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(module.config)
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](module.config)
    frequencies, attention_factor = inverse_frequencies(rope, head_dim, WINDOW)
    assert frequencies.dtype == torch.float32 and frequencies.shape == (head_dim // 2,)
    assert torch.equal(frequencies, expected) and torch.equal(frequencies, module.inv_freq)
    assert attention_factor == expected_factor == module.attention_scaling


@pytest.mark.parametrize("settings", [{"factor": 16.0}, {"attention_factor": 1.3}, {}])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_longrope_equals_that_of_transformers_bitwise(head_dim, settings):
    rope = longrope(head_dim, **settings)
    module = rotary_module(rope, head_dim)
    frequencies, attention_factor = inverse_frequencies(rope, head_dim, WINDOW)
    assert torch.equal(frequencies, module.inv_freq) and attention_factor == module.attention_scaling > 1


LENGTHS = (1, 8191, 8192, 8193, 131071, 131072, 131073, 200000, 1048576)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [*ROPES, "longrope"])
def test_frequencies_at_a_length_are_those_of_a_forward_call(name, length):
    rope = ROPES.get(name) or longrope(64)
    module = rotary_module(rope, 64, length)
    frequencies = RotaryFrequencies(rope, 64, WINDOW)
    assert torch.equal(frequencies(length), module.inv_freq)
    assert frequencies.attention_factor == module.attention_scaling


def test_dynamic_is_the_source_up_to_its_window_and_longrope_changes_at_the_original_one():
    default, _ = inverse_frequencies(DEFAULT, 64, 8192)
    dynamic = RotaryFrequencies(ROPES["dynamic"], 64, 8192)
    assert torch.equal(dynamic(8192), default)
    # theta (factor L / W - (factor - 1))^(d / (d - 2)) at L = 4 W
    base = 500000.0 * (3.7 * 4 - 2.7) ** (64 / 62)
    torch.testing.assert_close(dynamic(32768), base ** -(torch.arange(32) / 32), rtol=1e-5, atol=0)
    rope = longrope(64)
    frequencies = RotaryFrequencies(rope, 64, WINDOW)
    torch.testing.assert_close(default / frequencies(8192), torch.tensor(rope["short_factor"]))
    torch.testing.assert_close(default / frequencies(8193), torch.tensor(rope["long_factor"]))


def test_one_tensor_for_each_result():
    """No copy to the device for a micro-batch whose frequencies are known."""
    assert RotaryFrequencies(YARN, 64, 8192)(None) is not None
    fixed, sets = RotaryFrequencies(DEFAULT, 64, 8192), RotaryFrequencies(longrope(64), 64, WINDOW)
    assert fixed(1) is fixed(None) is fixed(100000)
    assert sets(9000) is sets(100000) is not sets(17)
    same = longrope(64)
    same["long_factor"] = same["short_factor"]
    assert RotaryFrequencies(same, 64, WINDOW)(None) is not None  # does not depend on the length
    with pytest.raises(AssertionError, match="longrope depends on the length"):
        sets(None)


def test_types_that_are_counted_from_the_window():
    for name, rope in ROPES.items():
        assert same_frequencies(rope, 64, 8192, 32768) == ("dynamic" not in name)
    assert same_frequencies(ROPES["dynamic"], 64, 8192, 8192)
    assert same_frequencies(longrope(64, factor=4.0), 64, 8192, 32768)
    assert not same_frequencies(longrope(64), 64, 8192, 32768)  # its attention factor is


def test_all_types_of_transformers_are_known():
    assert {"default", "linear", "dynamic", "yarn", "longrope", "llama3"} <= {*rope_types()}


@pytest.mark.parametrize(
    "rope, head_dim, message",
    [
        ({"rope_type": "axial", "rope_theta": 1e4}, 64, "'axial' is not supported; supported are default, linear"),
        (DEFAULT, 63, "63 is odd"),
        ({**DEFAULT, "partial_rotary_factor": 0.5}, 64, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_supported_is_refused(rope, head_dim, message):
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(rope, head_dim, 8192)


def test_the_dict_is_left_as_it_is():
    rope = dict(YARN)
    inverse_frequencies(rope, 64, 8192)
    assert rope == YARN
