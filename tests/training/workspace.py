"""A small random model, random token files and a recipe that trains all objectives on them, in one folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoModelForCausalLM

from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.run import PhaseRun, build
from tests.checkpoint.small_models import MODELS, SIZES, write_model

WINDOW, TARGET = SIZES["max_position_embeddings"], 4 * SIZES["max_position_embeddings"]


def make_workspace(folder: Path, model: str = "llama_3", sizes: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes everything under `folder` and returns the recipe's path. `changes` are sections to merge in."""
    write_model(model, folder / "model", sizes=sizes)
    write_perturbed(folder / "model", folder / "teacher")
    generator = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{folder / 'texts'}.bin", dtype=np.uint16)
    for length in generator.integers(20, 400, size=60):
        builder.add_document(generator.integers(0, SIZES["vocab_size"], size=length), [int(length)])
    builder.finalize(f"{folder / 'texts'}.idx")
    recipe: dict[str, Any] = {
        "model": {"hf": "model", "rope": {"method": "abf", "theta": 1e6}, "max_position_embeddings": TARGET},
        "teacher": {"hf": "teacher"},
        "step": {"tokens_per_microbatch": TARGET},
        "objectives": {
            "long_text": {"microbatches": 2, "sequence_length": TARGET, "data": "texts"},
            "short_to_long": {
                "microbatches": 2,
                "sequence_length": WINDOW,
                "data": "texts",
                "positions": "cream",
                "weight": 10,
            },
            "short_restoration": {
                "microbatches": 2,
                "sequence_length": WINDOW // 4,
                "data": "texts",
                "layers": [1, 3],
                "weight": 5,
            },
        },
        "data": {"texts": {"texts": 1.0}},
        "precision": {"params": "fp32"},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 6, "recompute": "none", "checkpoint_every_steps": 100},
        "run": {"dir": "run"},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_recipe(folder: Path, **sections: Any) -> Path:
    """The recipe of a workspace with whole sections replaced, in a file of its own."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | sections
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_perturbed(model: Path, folder: Path, seed: int = 11) -> None:
    """A teacher near the student, so that no cosine is exactly one (where its gradient is noise)."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        parameter.data += torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
    teacher.save_pretrained(folder)


def build_run(path: Path, groups: ProcessGroupCollection, *overrides: str) -> PhaseRun:
    """What `longred_megatron.train` builds for this recipe."""
    [phase] = read_phases(load_recipe(path, overrides))
    return build(phase, MicroBatchSource(phase), groups)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics a run reproduces: all but times, speeds and memory."""
    return [{k: v for k, v in line.items() if not re.search("second|memory|utilization", k)} for line in metrics]


__all__ = [
    "MODELS",
    "TARGET",
    "WINDOW",
    "build_run",
    "make_workspace",
    "read_metrics",
    "without_times",
    "write_perturbed",
    "write_recipe",
]
