"""What comparisons compute on: random models, random texts, and recipes that train them. Nothing is downloaded."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from longred_megatron.bench.base import Sizes
from longred_megatron.recipe import Phase, load_recipe, read_phases
from longred_megatron.recipe.auto_layers import spread
from longred_megatron.training.microbatches import MicroBatchSource, dump
from longred_megatron.training.small_copy import write_texts

ROPE_THETA, LONGER_THETA = 1e5, 4e6  # SmolLM2's; 40 times: LongReD's for two doublings of the window (5e5 to 2e7)
DRIFT = 0.5  # of a weight's size: how far student and teacher are apart; of equal states a cosine's loss is noise
COMPARED_LAYERS = 6  # LongReD's for 32K


def write_llama(folder: Path, sizes: Sizes, layers: int, drift: bool = False) -> Path:
    """A random Llama in fp32 with tied embeddings. drift: near the one that is written without."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=original_window(sizes),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if drift:
        for parameter in model.parameters():
            parameter.data += DRIFT * config.initializer_range * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def original_window(sizes: Sizes) -> int:
    """A quarter of the target window, as LongReD's 8K of 32K."""
    return sizes.sequence_length // 4


def longred_objectives(sizes: Sizes, layers: int, compared: int = COMPARED_LAYERS) -> dict[str, Any]:
    """LongReD's three in its mix and weights; short texts have an eighth of the target window."""
    long_text, short_to_long, short_restoration = sizes.microbatches
    return {
        "long_text": {"microbatches": long_text, "sequence_length": sizes.sequence_length},
        "short_to_long": {
            "microbatches": short_to_long,
            "sequence_length": original_window(sizes),
            "positions": "cream",
            "weight": 10,
        },
        "short_restoration": {
            "microbatches": short_restoration,
            "sequence_length": sizes.sequence_length // 8,
            "layers": spread(min(compared, layers), layers),
            "weight": 5,
        },
    }


def write_recipe(
    folder: Path,
    sizes: Sizes,
    objectives: Mapping[str, Mapping[str, Any]],
    layers: int,
    params: str,
    rope: str | dict[str, Any] = "none",
) -> Path:
    """A recipe that trains `objectives`, with models and texts beside it; returns its path."""
    for name, drift in (("student", False), ("teacher", True)):
        if not (folder / name).exists():
            write_llama(folder / name, sizes, layers, drift)
    if not (folder / "texts.idx").exists():
        write_texts(folder / "texts", sizes.sequence_length, sizes.vocabulary)
    recipe = {
        "model": {"hf": "student", "rope": rope, "max_position_embeddings": sizes.sequence_length},
        "teacher": {"hf": "teacher"},
        "step": {"tokens_per_microbatch": sizes.sequence_length},
        "objectives": {name: {**each, "data": "texts"} for name, each in objectives.items()},
        "data": {"texts": {"texts": 1.0}},
        "precision": {"params": params},
        "optimizer": {"lr": 1e-5},  # so small that losses stay finite on random texts
        "training": {"steps": 1, "recompute": "none"},
        "run": {"dir": "run"},
    }
    path = folder / f"{'-'.join(objectives)}-{params}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


longred_recipe = partial(write_recipe, rope={"method": "abf", "theta": LONGER_THETA})


def phase_of(recipe: Path, *overrides: str) -> Phase:
    """The only one."""
    [phase] = read_phases(load_recipe(recipe, overrides))
    return phase


def step_tokens(phase: Phase) -> int:
    """Of one optimizer step."""
    return phase.recipe.num_microbatches * phase.recipe.step.tokens_per_microbatch


def write_microbatches(phase: Phase, folder: Path) -> Path:
    """The micro-batches of the first step as a file, see `microbatches.dump`."""
    return dump(MicroBatchSource(phase).step(1, 0, 1), folder, step=1, replica=0)
