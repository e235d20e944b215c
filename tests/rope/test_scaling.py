import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longred_megatron.rope.scaling import extended_rope, inverse_frequencies

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
ROPES = {
    "default": DEFAULT,
    "default of a small base": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {**DEFAULT, "rope_type": "linear", "factor": 4.0},
    "linear, odd factor": {**DEFAULT, "rope_type": "linear", "factor": 3.7},
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
}


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_frequencies_equal_those_of_transformers_bitwise(rope, head_dim):
    # the window agrees with every factor as far as transformers checks it
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(rope),
    )
    if rope["rope_type"] == "default":
        expected, expected_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    module = LlamaRotaryEmbedding(config)
    frequencies, attention_factor = inverse_frequencies(rope, head_dim)
    assert frequencies.dtype == torch.float32 and frequencies.shape == (head_dim // 2,)
    assert torch.equal(frequencies, expected) and torch.equal(frequencies, module.inv_freq)
    assert attention_factor == expected_factor == module.attention_scaling


@pytest.mark.parametrize(
    "rope, head_dim, message",
    [
        (
            {"rope_type": "longrope", "rope_theta": 1e4},
            64,
            "'longrope' is not supported; supported are default",
        ),
        (DEFAULT, 63, "63 is odd"),
        ({**DEFAULT, "partial_rotary_factor": 0.5}, 64, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_supported_is_refused(rope, head_dim, message):
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(rope, head_dim)


def test_abf_changes_the_base_only_and_keeps_a_scaling():
    assert extended_rope(DEFAULT, method="abf", original_window=8192, theta=2e7) == {
        "rope_type": "default",
        "rope_theta": 2e7,
    }
    assert extended_rope(LLAMA3, method="abf", original_window=8192, theta=2e7) == {
        **LLAMA3,
        "rope_theta": 2e7,
    }


def test_pi_is_linear_scaling():
    extended = extended_rope(DEFAULT, method="pi", original_window=8192, factor=4.0)
    assert extended == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}


def test_yarn_takes_the_original_window_and_the_given_settings():
    extended = extended_rope(
        DEFAULT, method="yarn", original_window=8192, factor=4.0, beta_fast=16.0, truncate=False, mscale=None
    )
    assert extended == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 16.0,
        "truncate": False,
    }


def test_pi_and_yarn_may_change_the_base_too():
    for method in ("pi", "yarn"):
        extended = extended_rope(DEFAULT, method=method, original_window=8192, factor=4.0, theta=1e6)
        assert extended["rope_theta"] == 1e6


def test_none_keeps_the_source_and_no_method_changes_it():
    for source in (DEFAULT, LLAMA3, YARN):
        kept = dict(source)
        assert extended_rope(source, method="none", original_window=8192) == kept
        extended_rope(source, method="abf", original_window=8192, theta=1.0)
        assert source == kept


@pytest.mark.parametrize(
    "source, arguments, message",
    [
        (DEFAULT, {"method": "ntk"}, "'ntk' is not known; choose one of abf, pi, yarn, none"),
        (DEFAULT, {"method": "abf"}, "'abf' needs theta"),
        (DEFAULT, {"method": "pi"}, "'pi' needs factor"),
        (DEFAULT, {"method": "yarn"}, "'yarn' needs factor"),
        (DEFAULT, {"method": "abf", "theta": 1e6, "factor": 4.0}, "'abf' does not use factor"),
        (DEFAULT, {"method": "none", "theta": 1e6}, "'none' does not use theta"),
        (DEFAULT, {"method": "pi", "factor": 4.0, "beta_fast": 32}, "'pi' does not use beta_fast"),
        (DEFAULT, {"method": "yarn", "factor": 4.0, "beta_fats": 32}, "'yarn' does not use beta_fats"),
        (
            LLAMA3,
            {"method": "pi", "factor": 4.0},
            "'pi' cannot go on top of the model's own 'llama3' scaling",
        ),
        (
            YARN,
            {"method": "yarn", "factor": 4.0},
            "'yarn' cannot go on top of the model's own 'yarn' scaling",
        ),
    ],
)
def test_impossible_extensions_are_refused(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        extended_rope(source, original_window=8192, **arguments)
