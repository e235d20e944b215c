"""Each method alone; then all that are found, also one that nobody here knows."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging as transformers_logging

from longred_megatron.recipe import problems
from longred_megatron.rope import METHODS, Rope, RopeMethod, RopeSource
from longred_megatron.rope.frequencies import RotaryFrequencies
from tests.walks import example as walk
from tests.walks import scratch_copy

ROOT = Path(__file__).parents[2]
DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1.0e6, "factor": 4.0, "original_max_position_embeddings": 2048}
LINEAR = {"rope_type": "linear", "rope_theta": 1.0e4, "factor": 2.0}
SOURCE = RopeSource(DEFAULT, head_dim=16, original_window=8192, target_window=32768)
SHORT, LONG = [1.0, 1.0, 1.02, 1.04, 1.1, 1.2, 1.3, 1.4], [1.0, 1.1, 1.5, 2.0, 2.8, 3.4, 3.9, 4.2]
# Settings of the methods that need some.
EXAMPLES: dict[str, dict[str, Any]] = {
    "abf": {"theta": 2e7},
    "longrope": {"short_factor": SHORT, "long_factor": LONG},
}


def parsed(value: Any) -> RopeMethod:
    return TypeAdapter(Rope).validate_python(value)


def example(name: str) -> RopeMethod:
    return parsed({"method": name} | EXAMPLES.get(name, {}))


def extended(value: Any, source: RopeSource = SOURCE) -> dict[str, Any]:
    return parsed(value).extended(source)


def config_of(rope: dict[str, Any], source: RopeSource, window: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * source.head_dim,
        num_attention_heads=2,
        head_dim=source.head_dim,
        max_position_embeddings=window,
        rope_parameters=dict(rope),
    )


# One by one


def test_abf_changes_the_base_only_and_keeps_a_scaling() -> None:
    assert extended({"method": "abf", "theta": 2e7}) == {"rope_type": "default", "rope_theta": 2e7}
    scaled = replace(SOURCE, parameters=LLAMA3)
    assert extended({"method": "abf", "theta": 2e7}, scaled) == {**LLAMA3, "rope_theta": 2e7}


def test_pi_is_linear_scaling() -> None:
    linear = {"rope_type": "linear", "rope_theta": 500000.0}
    assert extended({"method": "pi", "factor": 8.0}) == linear | {"factor": 8.0}
    assert extended("pi") == linear | {"factor": 4.0}  # target / original window


def test_yarn_takes_the_original_window_and_the_given_settings() -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert extended("yarn") == yarn
    assert extended({"method": "yarn", "factor": 8, "beta_fast": 16.0, "attention_factor": 1.1}) == yarn | {
        "factor": 8.0,
        "beta_fast": 16.0,
        "attention_factor": 1.1,
    }


def test_dynamic_counts_from_the_original_window() -> None:
    assert extended("dynamic") == {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 4.0}
    assert extended({"method": "dynamic", "factor": 1})["factor"] == 1.0
    assert example("dynamic").max_position_embeddings(SOURCE) == 8192


def test_longrope_takes_the_original_window() -> None:
    expected = {
        "rope_type": "longrope",
        "rope_theta": 500000.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    settings = {"method": "longrope"} | EXAMPLES["longrope"]
    assert extended(settings) == expected
    assert extended(settings | {"attention_factor": 1.2}) == expected | {"attention_factor": 1.2}
    assert extended(settings | {"factor": 2})["factor"] == 2.0
    assert example("longrope").max_position_embeddings(SOURCE) == 32768


def test_a_scaling_that_is_kept_is_not_moved_by_the_window() -> None:
    for method in ("none", {"method": "abf", "theta": 1e7}):
        for parameters in (DEFAULT, LLAMA3, YARN, LINEAR):
            scaled = replace(SOURCE, parameters=parameters)
            assert parsed(method).max_position_embeddings(scaled) == 32768
        dynamic = replace(SOURCE, parameters={**DEFAULT, "rope_type": "dynamic", "factor": 2.0})
        assert parsed(method).max_position_embeddings(dynamic) == 8192


@pytest.mark.parametrize("source", [DEFAULT, LLAMA3, YARN])
def test_none_keeps_the_source(source: dict[str, Any]) -> None:
    assert extended("none", replace(SOURCE, parameters=source)) == source


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"method": "ntk2"}, "'ntk2'.*'abf'.*'none', 'pi', 'yarn'"),
        ({"method": "abf"}, "theta\n.*required"),
        ({"method": "longrope"}, "(?s)short_factor\n.*required.*long_factor\n.*required"),
        ({"method": "abf", "theta": 1e6, "factor": 4.0}, "factor\n.*not permitted"),
        ({"method": "none", "theta": 1e6}, "theta\n.*not permitted"),
        ({"method": "pi", "factor": 4.0, "beta_fast": 32}, "beta_fast\n.*not permitted"),
        ({"method": "yarn", "factor": 4.0, "beta_fats": 32}, "beta_fats\n.*not permitted"),
        ({"method": "dynamic", "factor": 0.5}, "factor\n.*greater than or equal to 1"),
        (
            {"method": "longrope", "short_factor": [0.0], "long_factor": [1]},
            "short_factor.0\n.*greater than 0",
        ),
    ],
)
def test_settings_that_no_method_has_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parsed(value)


FACTORS = {"short_factor": SHORT, "long_factor": LONG}
PROBLEMS: list[tuple[Any, dict[str, Any], str]] = [
    ({"method": "abf", "theta": 1e4}, {}, "`r.theta` is 10000: is below the 500000 of model.hf; a longer window needs"),
    ({"method": "abf", "theta": 5e5}, {}, "`r.theta` is 500000: has no effect: it is the 500000 of model.hf"),
    ("pi", {"target_window": 8192}, "`r.factor` is left out and 8192 / 8192 gives 1: must be greater than 1; raise"),
    ({"method": "pi", "factor": 2}, {}, "`r.factor` is 2: reaches only 16384 of the 32768 positions of "),
    ({"method": "yarn", "factor": 2}, {}, "`r.factor` is 2: reaches only 16384 of the 32768 positions of "),
    ({"method": "yarn", "beta_fast": 1, "beta_slow": 32}, {}, "`r.beta_fast` is 1: must be greater than beta_slow 32"),
    ("dynamic", {"target_window": 8192}, "`r.method` is 'dynamic': has no effect: the base grows past the 8192"),
    (
        {"method": "longrope", "short_factor": [1.0], "long_factor": LONG},
        {},
        "`r.short_factor` has 1 entries: must have 8, one for each rotated pair of the 16 dims of a head",
    ),
    (
        {"method": "longrope", **FACTORS},
        {"target_window": 8192},
        "`r.long_factor` has no effect: it is for more than the 8192 positions of model.hf",
    ),
    (
        {"method": "longrope", **FACTORS, "factor": 4, "attention_factor": 1},
        {},
        "`r.factor` is 4: has no effect, since attention_factor is given",
    ),
    *(
        (
            {"method": name} | EXAMPLES.get(name, {}),
            {"parameters": LLAMA3},
            f"`r.method` is '{name}': model.hf already has scaled RoPE (llama3), which cannot be scaled twice; use "
            "abf, which keeps its scaling, or none",
        )
        for name in ("pi", "yarn", "dynamic", "longrope")
    ),
]


@pytest.mark.parametrize(("value", "change", "sentence"), PROBLEMS)
def test_problems(value: Any, change: dict[str, Any], sentence: str) -> None:
    [found] = parsed(value).problems("r", replace(SOURCE, **change))
    assert found.startswith(sentence)


# All of them


@pytest.mark.parametrize("name", METHODS)
def test_no_method_has_a_problem_with_a_model_it_is_for(name: str) -> None:
    assert list(example(name).problems("model.rope", SOURCE)) == []


@pytest.mark.parametrize("name", METHODS)
def test_no_method_changes_the_source(name: str) -> None:
    source = replace(SOURCE, parameters=dict(DEFAULT))
    example(name).extended(source)["rope_theta"] = 1.0
    assert source.parameters == DEFAULT


@pytest.mark.parametrize("name", METHODS)
def test_transformers_accepts_what_each_method_gives(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope, window = example(name).extended(SOURCE), example(name).max_position_embeddings(SOURCE)
    transformers_logging.enable_propagation()
    try:
        config_of(rope, SOURCE, window).save_pretrained(tmp_path)
        read = AutoConfig.from_pretrained(tmp_path)
    finally:
        transformers_logging.disable_propagation()
    assert read.rope_parameters == rope
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("length", [1, 8192, 8193, 20000, 32768, 40000])
@pytest.mark.parametrize("name", METHODS)
def test_frequencies_of_each_method_are_those_of_transformers(name: str, length: int) -> None:
    rope, window = example(name).extended(SOURCE), example(name).max_position_embeddings(SOURCE)
    module = LlamaRotaryEmbedding(config_of(rope, SOURCE, window))
    positions = torch.tensor([[0, length - 1, length // 2]])
    cos, sin = module(torch.zeros(1), positions)
    frequencies = RotaryFrequencies(rope, SOURCE.head_dim, window)
    assert torch.equal(frequencies(length), module.inv_freq)
    angles = positions[0, :, None].float() * frequencies(length)
    assert torch.equal(angles.cos() * frequencies.attention_factor, cos[0, :, :8])
    assert torch.equal(angles.sin() * frequencies.attention_factor, sin[0, :, 8:])


@pytest.mark.parametrize("name", METHODS)
def test_each_key_with_a_bad_value_is_named(name: str) -> None:
    rope = {"method": name} | EXAMPLES.get(name, {})
    for key in METHODS[name].model_fields.keys() - {"method"}:
        found = problems.of_recipe({"model": {"rope": rope | {key: "much"}}})
        assert any(problem.startswith(f"`model.rope.{key}` is 'much': must be a") for problem in found), found
    found = problems.of_recipe({"model": {"rope": rope | {"no_such_key": 1}}})
    assert any(problem.startswith("unknown key `model.rope.no_such_key`") for problem in found)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_alone_stands_for_its_defaults(name: str) -> None:
    if any(field.is_required() for field in METHODS[name].model_fields.values()):
        with pytest.raises(ValidationError, match="required"):
            parsed(name)
    else:
        assert parsed(name) == parsed({"method": name})


# A new one


def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    """The example of CONTRIBUTING.md, put into a copy of the package; nothing else is edited."""
    (scratch_copy(tmp_path) / "rope" / "ntk.py").write_text(walk("A new RoPE method"))
    script = """
from longred_megatron.recipe import problems
from longred_megatron.recipe.schema import Model
from longred_megatron.rope import METHODS, RopeSource
from longred_megatron.rope.frequencies import RotaryFrequencies

source = RopeSource({"rope_type": "default", "rope_theta": 1e4}, 64, 4096, 16384)
rope = Model(hf="m", rope="ntk", max_position_embeddings=16384).rope
assert type(rope).__name__ == "NtkRope" and "ntk" in METHODS
assert not list(rope.problems("model.rope", source))
before, after = (RotaryFrequencies(r, 64, rope.max_position_embeddings(source))(None)
                 for r in (source.parameters, rope.extended(source)))
assert abs(before[-1] / after[-1] - 4) < 1e-3 and before[0] == after[0]
rope = Model(hf="m", rope={"method": "ntk", "stretch": 0.25}, max_position_embeddings=16384).rope
print(*rope.problems("model.rope", source))
for value in ({"method": "ntk", "strech": 2}, {"method": "nkt"}, {"theta": 1}):
    print(*(p for p in problems.of_recipe({"model": {"rope": value}}) if "rope" in p))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == ("`model.rope.stretch` times the ratio of the windows is 1: must be greater than 1; raise it")
    assert lines[1] == "unknown key `model.rope.strech`; did you mean `stretch`?"
    assert lines[2].startswith("`model.rope.method` is 'nkt': must be one of ") and "'none', 'ntk', 'pi'" in lines[2]
    assert lines[3].startswith("`model.rope.method` is missing: add one of ") and "'none', 'ntk', 'pi'" in lines[3]
