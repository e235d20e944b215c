"""A family is one module, found because it is there; nothing else knows its name."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import longred_megatron
from longred_megatron.errors import UserError
from longred_megatron.families import FAMILIES, read_architecture
from tests.checkpoint.small_models import (
    DYNAMIC_ROPE,
    GROUPED,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    LONGROPE,
    MODELS,
    SIZES,
    YARN_ROPE,
)

PACKAGE = Path(longred_megatron.__file__).parent
ROPES = {rope["rope_type"]: rope for rope in (LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, DYNAMIC_ROPE, LONGROPE)}
ROPES["default"] = {"rope_type": "default", "rope_theta": 5e5}
SUPPORTED = ", ".join(sorted(FAMILIES))


def problems(folder: Path, config: Any) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def config_of(family: str, **settings: Any) -> dict[str, Any]:
    [config, *_] = [config for make in MODELS.values() if (config := make()).model_type == family]
    return config.to_dict() | settings


def test_every_module_is_a_family_and_has_a_small_model() -> None:
    modules = {path.stem for path in (PACKAGE / "families").glob("*.py")} - {
        "__init__",
        "base",
        "config_checks",
        "weights",
    }
    assert {type(family).__module__.rpartition(".")[2] for family in FAMILIES.values()} == modules
    assert FAMILIES.keys() == {make().model_type for make in MODELS.values()}
    assert FAMILIES.keys() >= {"llama", "mistral", "qwen2", "qwen3"}


def test_nothing_else_knows_a_familys_name() -> None:
    # llama.cpp's file format has names of its own.
    others = set(PACKAGE.rglob("*.py")) - set((PACKAGE / "families").iterdir()) - {PACKAGE / "checkpoint" / "gguf.py"}
    for path in others:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert texts.isdisjoint(FAMILIES), path


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": ["llama"]}, {}, []])
def test_unknown_families_are_named_with_the_known(config: Any, tmp_path: Path) -> None:
    name = config.get("model_type") if config else None
    assert problems(tmp_path, config) == [f"model_type {name!r} is not supported; supported are {SUPPORTED}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_family_can_represent(family: str, tmp_path: Path) -> None:
    config = config_of(family, hidden_act="tanh")
    config["rope_parameters"] |= {"partial_rotary_factor": 0.5}
    supported = " or ".join(map(repr, FAMILIES[family].activations()))
    assert problems(tmp_path, config) == [
        f"hidden_act 'tanh' is not supported, only {supported}",
        "partial_rotary_factor must be 1",
    ]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2, "layer_types": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2, "layer_types": None}),
    ],
)
def test_sliding_windows_are_refused(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    [problem] = problems(tmp_path, config_of(family, **settings))
    assert problem.startswith("sliding_window 4096 limits attention, which this project does not train; set it to null")


def test_the_window_mistral_has_by_default_is_refused_too(tmp_path: Path) -> None:
    config = config_of("mistral")
    del config["sliding_window"]
    assert problems(tmp_path, config)[0].startswith("sliding_window 4096 limits attention")


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}), ("qwen3", {"attention_bias": True})],
)
def test_biases_megatron_cannot_hold_are_refused(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    [problem] = problems(tmp_path, config_of(family, **settings))
    both = {"attention_bias": False, "mlp_bias": False} | settings
    assert problem.startswith(f"{both} is not supported: Megatron has one switch for the biases")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_types_are_those_transformers_gives_back(family: str, rope_type: str) -> None:
    rope = ROPES[rope_type]
    make = CONFIG_MAPPING[family]
    try:
        config = make(**SIZES, **GROUPED, rope_parameters=dict(rope))
        same = all(config.rope_parameters[key] == value for key, value in rope.items())
    except Exception:  # of many types: transformers' validation
        same = False
    assert same == (rope_type in FAMILIES[family].rope_types())


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    """Some folders on Hugging Face have such code; transformers has its own."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = config_of("llama", auto_map={"AutoConfig": "evil.Config"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path).family == "llama"
    assert not (tmp_path / "ran").exists()
