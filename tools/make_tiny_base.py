#!/usr/bin/env python
"""Makes the demo's base model, tests/assets/tiny_base, from nothing but the Python standard library's texts.

    make tiny-base

Random weights, then the recipes tiny_base_1.yaml ... in order, each starting from the export of the one before: a
small model learns to copy only if it begins with dense repetition at a short length. Everything goes to
build/tiny_base; the last export's weights replace those in tests/assets/tiny_base, whose config and tokenizer are
the input.
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longred_megatron.data.prepare import prepare
from longred_megatron.data.synthetic import write_sets
from longred_megatron.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
ASSET, BUILD = ROOT / "tests/assets/tiny_base", ROOT / "build/tiny_base"
SETS = ("repeats", "numbers", "keys", "keys_128", "repeats_512", "keys_512", "many_keys_512", "bare_keys_512", "text")
SEED = 2024


def write_start(asset: Path, output: Path, seed: int) -> None:
    """A folder like `asset` with random weights: normal, of the config's initializer_range; what is added to the
    residual stream is smaller by sqrt(2 x layers), as in GPT-2."""
    shutil.copytree(asset, output, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(asset)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    model.bfloat16().save_pretrained(output)


def main() -> None:
    texts = {name: BUILD / "texts" / f"{name}.jsonl" for name in SETS}
    write_sets(BUILD / "texts", [name for name, path in texts.items() if not path.exists()], SEED)
    for name, path in texts.items():
        prefix = BUILD / "data" / name
        if not prefix.with_suffix(".idx").exists():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            print(f"{name}: {prepare([path], ASSET / 'tokenizer.model', prefix).tokens:,} tokens", flush=True)
    if not (BUILD / "start").exists():
        write_start(ASSET, BUILD / "start", SEED)
    for recipe in sorted((ROOT / "recipes").glob("tiny_base_*.yaml")):
        print(f"\n{recipe.name}", flush=True)
        if subprocess.run([sys.executable, "-m", "longred_megatron.train", recipe], cwd=ROOT).returncode:
            raise UserError(
                f"{recipe} did not finish; its message is above; the same command goes on from its checkpoint"
            )
    last = max(BUILD.glob("stage_*/hf"))
    shutil.copy(last / "model.safetensors", ASSET / "model.safetensors")
    print(f"{ASSET / 'model.safetensors'}: written")


if __name__ == "__main__":
    run_cli(main)
