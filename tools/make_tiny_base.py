#!/usr/bin/env python
"""Makes the demo's base model, tests/assets/tiny_base, from nothing but the Python standard library's texts.

    make tiny-base

Random weights, then the recipes tiny_base_1.yaml ... in order, each starting from the export of the one before: a
small model learns to copy only if it begins with dense repetition at a short length. Everything goes to
build/tiny_base; the last export's weights replace those in tests/assets/tiny_base, whose config and tokenizer are
the input. `--hidden-size 256` or `--seed 7` makes a model of another width, or from other random weights, in a folder
of its own (build/tiny_base_256, build/tiny_base_seed_7) and leaves the assets as they are.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from demo_texts import write_sets
from longred_megatron.errors import UserError, run_cli
from tiny_runs import BASE, ROOT, train

BUILD = ROOT / "build/tiny_base"
SETS = (
    "repeats_128",
    "short_repeats_128",
    "long_repeats_128",
    "bare_keys_128",
    "keys_128",
    "keys_512",
    "repeats_512",
    "text",
)
SEED = 2024
LOOKUP_STAGE = 3


def write_windows(texts: Path, prefix: Path, num_tokens: int) -> int:
    """Indexes the first `num_tokens` tokens of each text, so that a training sequence is one text: a key asked for
    was said in it. Returns their number; shorter texts are left out."""
    import numpy as np  # here and below, since these take seconds: see `run_cli`
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from longred_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(BASE / "tokenizer.model")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    num_windows = 0
    for line in texts.read_text(encoding="utf-8").splitlines():
        tokens = tokenizer.encode(json.loads(line)["text"])[:num_tokens]
        if len(tokens) == num_tokens:
            builder.add_document(np.asarray(tokens), [num_tokens])
            num_windows += 1
    builder.finalize(f"{prefix}.idx")
    return num_windows


def write_start(asset: Path, output: Path, seed: int, hidden_size: int | None) -> None:
    """A folder like `asset` with random weights: normal, of the config's initializer_range; what is added to the
    residual stream is smaller by sqrt(2 x layers), as in GPT-2. Of another width it has as wide heads, and more."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(asset, output, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(asset, local_files_only=True, trust_remote_code=False)
    if hidden_size is not None:
        config.intermediate_size = config.intermediate_size * hidden_size // config.hidden_size
        config.hidden_size, heads = hidden_size, hidden_size // config.head_dim
        config.num_attention_heads = config.num_key_value_heads = heads
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    model.bfloat16().save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, metavar="N", help="another width, a multiple of 64; not the assets'")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="of the weights and the order of the texts")
    arguments = parser.parse_args()
    hidden_size, seed = arguments.hidden_size, arguments.seed
    if hidden_size is not None and (hidden_size < 64 or hidden_size % 64):
        raise UserError(f"--hidden-size {hidden_size}: must be a multiple of 64, as 256")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must be from 0 to 4294967295")
    from longred_megatron.data.prepare import prepare

    variant = (f"_{hidden_size}" if hidden_size is not None else "") + (f"_seed_{seed}" if seed != SEED else "")
    build = BUILD.with_name(f"{BUILD.name}{variant}")
    texts = {name: BUILD / "texts" / f"{name}.jsonl" for name in SETS}
    write_sets(BUILD / "texts", [name for name, path in texts.items() if not path.exists()], SEED)
    (BUILD / "data").mkdir(exist_ok=True)
    for name, path in texts.items():
        prefix = BUILD / "data" / name
        if prefix.with_suffix(".idx").exists():
            continue
        if name == "text":
            print(f"{name}: {prepare([path], BASE / 'tokenizer.model', prefix).tokens:,} tokens", flush=True)
        else:
            num_tokens = int(name.rpartition("_")[2])
            print(f"{name}: {write_windows(path, prefix, num_tokens):,} x {num_tokens} tokens", flush=True)
    hf = build / "start"
    if not hf.exists():
        write_start(BASE, hf, seed, hidden_size)
    for number, recipe in enumerate(sorted((ROOT / "recipes").glob("tiny_base_*.yaml")), start=1):
        print(f"\n{recipe.name}", flush=True)
        run = build / f"stage_{number}"
        changes = [f"model.hf={hf}", f"run.dir={run}", f"training.seed={seed}"]
        if hidden_size is not None:
            # The recipes suit 192. Adam's best rate falls as the width grows (arXiv 2203.03466), and 256 takes three
            # times as long to learn to look keys up.
            changes += [f"optimizer.lr={2.0e-3 * 192 / hidden_size}"]
            changes += ["training.steps=3000"] if number == LOOKUP_STAGE else []
        train(recipe, *changes)  # what has been done is not done again
        hf = run / "hf"
    if not variant:
        hf = Path(shutil.copy(hf / "model.safetensors", BASE / "model.safetensors"))
    print(f"{hf}: written")


if __name__ == "__main__":
    run_cli(main)
