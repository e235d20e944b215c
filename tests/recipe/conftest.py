"""A small valid recipe to break, and the architecture it is for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from longred_megatron.families import Architecture
from longred_megatron.recipe import Phase, Recipe
from longred_megatron.recipe.phases import _teachers

LLAMA3_8B = Architecture(
    family="llama",
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    norm_epsilon=1e-5,
    tied_embeddings=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope={"rope_type": "default", "rope_theta": 5e5},
    max_position_embeddings=8192,
)


def phase_of(recipe: Recipe, source: Architecture, teacher: Architecture | None = None) -> Phase:
    """The one phase of a recipe. source: of model.hf; teacher: of every other model that is compared with."""
    others = teacher or source
    teachers = {hf: source if hf == recipe.model.hf else others for hf in _teachers(recipe, source)}
    return Phase(recipe, source, teachers)


@pytest.fixture
def architecture() -> Architecture:
    return LLAMA3_8B


@pytest.fixture
def values() -> dict[str, Any]:
    """As YAML gives it; for 1 rank."""
    return {
        "model": {"hf": "m", "rope": {"method": "abf", "theta": 2e7}, "max_position_embeddings": 32768},
        "step": {"tokens_per_microbatch": 65536},
        "objectives": {
            "long_text": {"microbatches": 8, "sequence_length": 32768, "data": "long"},
            "short_to_long": {
                "microbatches": 2,
                "sequence_length": 8192,
                "data": "window",
                "positions": "cream",
                "weight": 10,
                "whole_sequences": True,
            },
            "short_restoration": {
                "microbatches": 6,
                "sequence_length": 1024,
                "data": "short",
                "layers": [1, 9, 32],
                "weight": 5,
                "whole_sequences": True,
            },
        },
        "data": {"long": {"l": 1}, "window": {"w": 1}, "short": {"s": 0.5, "t": 2}},
        "optimizer": {"lr": 2e-5},
        "training": {"steps": 512},
        "run": {"dir": "r"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes values, or text as it is, to a recipe file of the test's folder."""

    def write(content: Any, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write
