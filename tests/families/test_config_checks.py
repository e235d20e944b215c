"""config.json as nobody's model has it: an architecture, or one message that names the key; and no code is run."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CohereConfig

from longred_megatron.errors import UserError
from longred_megatron.families import read_architecture
from longred_megatron.families.config_checks import config_problems

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}


def refused(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(PLAIN | changes))
    return message_of(folder)


def message_of(folder: Path) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    assert time.monotonic() - started < 30  # transformers is imported
    message = str(caught.value)
    assert message.startswith(f"{folder}/config.json: ") and "\n" not in message and len(message) < 800
    return message


SIZES = [key for key, value in PLAIN.items() if type(value) is int]


@pytest.mark.parametrize("key", [*SIZES, "head_dim"])
@pytest.mark.parametrize("value", [0, -1, True, "4", 1.5, float("nan"), float("inf"), 10**18, 10**400, [], {}], ids=str)
def test_sizes_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    assert f"{key} is " in refused(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3: must divide the 4"),
        ({"hidden_size": 36}, "even"),
        ({"head_dim": 7}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 10**400}, "RoPE"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor of RoPE is 0.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -4.0}}, "factor of RoPE is -4.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e308}}, "not positive, finite numbers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor of RoPE is nan"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "RoPE"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": True}}, "factor of RoPE is True"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1, 1, 0], "long_factor": [1.0] * 4}}, "0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "differ in RoPE"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported, only 'silu'"),
        ({"hidden_act": "no_such"}, "hidden_act 'no_such' is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"model_type": "x" * 10_000}, "is not supported"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_are_none(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, **changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_chunk_attention_config", {"chunk_size": 262144}),  # Qwen2.5-1M
        ("quantization_config", {"quant_method": "awq"}),
        ("compression_config", {"format": "int"}),
        ("logit_scale", 0.0625),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0),
        ("attention_multiplier", 0.0078125),
        ("no_rope_layers", [1, 0]),
        ("num_experts", 8),
        ("sliding_window", 4096),  # which transformers' Llama does not read
        ("attention_chunk_size", 8192),
        ("use_bidirectional_attention", True),
        ("is_causal", False),
        ("qk_layernorm", True),
        ("layer_types", ["chunked_attention", "full_attention"]),
        ("scale_emb", 12),
        ("configuration_files", ["config.4.0.0.json"]),
    ],
)
def test_keys_that_would_change_the_numbers_are_not_ignored(key: str, value: Any, tmp_path: Path) -> None:
    assert f"{key} " in refused(tmp_path, **{key: value})


def test_keys_that_change_nothing_are(tmp_path: Path) -> None:
    plain = {
        "attention_dropout": 0.1,
        "use_cache": False,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "_attn_implementation_autoset": True,
        "attn_implementation": "sdpa",
        "unsloth_version": "2025.1",
        "rope_interleaved": False,
        "is_llama_config": True,
        "quantization_config": None,
        "logit_scale": 1.0,
        "num_experts": 0,
        "is_causal": True,
        "transformers.js_config": {"dtype": "q4"},
        "head_dim": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | plain))
    assert read_architecture(tmp_path).head_dim == 8


@pytest.mark.parametrize("truncate", [False, True])
def test_yarns_one_switch_is_no_number(truncate: bool, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": truncate}
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"rope_scaling": scaling}))
    assert read_architecture(tmp_path).rope["truncate"] is truncate
    assert "factor of RoPE is True" in refused(tmp_path, rope_scaling=scaling | {"factor": True})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "limit"),
        (b'{"model_type": "llama", "model_type": "qwen2"}', "the key 'model_type' is given twice"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b"", "cannot be read as JSON"),
        (b"[]", "model_type None is not supported"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_no_config(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert expected in message_of(tmp_path)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    assert "no file but a folder, a pipe or a device" in message_of(tmp_path)
    path.unlink()
    path.mkdir()
    assert "no file but a folder, a pipe or a device" in message_of(tmp_path)
    path.rmdir()
    for target in ("/dev/zero", "nowhere"):
        path.symlink_to(target)
        message_of(tmp_path)
        path.unlink()


@pytest.mark.parametrize("model_type", ["llama", "no_such_model"])
def test_no_code_beside_it_is_run_and_nobody_is_asked(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    told = tmp_path / "told"
    (tmp_path / "configuration_mine.py").write_text(
        f"open({str(told)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Mine(LlamaConfig): pass\n"
    )
    mine = {"auto_map": {"AutoConfig": "configuration_mine.Mine"}, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | mine))
    try:
        assert read_architecture(tmp_path).family == "llama"
    except UserError as error:
        assert "is not supported" in str(error)
    assert not told.exists() and not asked


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "beta_fast", "short_factor", "long_factor", "truncate"]
rope = st.dictionaries(st.sampled_from([*ROPE_KEYS, "original_max_position_embeddings"]), anything, max_size=4)
types = st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
KEYS = [*PLAIN, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "tie_word_embeddings", "attention_bias"]


@pytest.mark.parametrize(
    "changes", [{"rope_scaling": {"rope_type": "default", "a\nb": False}}, {"a\nsoftcapping": 3.0}]
)
def test_a_key_s_name_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | changes))
    assert "'a\\n" in message_of(tmp_path)


@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=10_000)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), anything, max_size=2),
    scaling=st.none() | st.builds(lambda name, own: {"rope_type": name, **own}, types, rope),
)
def test_any_config_is_an_architecture_or_refused(changes: dict[str, Any], scaling: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"rope_scaling": scaling} | changes))
    try:
        assert read_architecture(tmp_path).num_parameters() > 0
    except UserError as error:
        assert all("\n" not in problem for problem in error.problems)


def test_a_new_family_may_have_other_names() -> None:
    assert not hasattr(CohereConfig(), "rms_norm_eps")
    assert config_problems({}, CohereConfig()) == []
