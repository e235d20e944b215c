#!/usr/bin/env python
"""Chooses the layers to distil: those whose attention the recipe's RoPE moves most, before any training."""

import argparse
import sys
from pathlib import Path

from longred_megatron.errors import UserError, report_beside, run_cli

EXAMPLES = """examples:
  python tools/select_layers.py recipes/smollm2_135m_longred_c.yaml
  python tools/select_layers.py recipes/smollm2_135m_longred_c.yaml --texts 64 --length 2048 --output layers

  # which theta? what each RoPE alone breaks, before any training
  python tools/select_layers.py recipes/smollm2_135m_longred_c.yaml --output layers \\
      --rope "{method: abf, theta: 1.0e6}" "{method: abf, theta: 1.0e7}" "{method: pi, factor: 8}" yarn

  torchrun --nproc-per-node 8 tools/select_layers.py recipes/llama3_8b_32k_longred_c.yaml    # texts over 8 GPUs

The texts are those of the recipe's first objective that names layers. The recipe's number of layers is chosen.
`layers: {auto: 6}` in a recipe does the same when the run starts. With --output: drift.json, tokens.safetensors,
results.json and report.html."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the numbers and the page")
    parser.add_argument("--texts", type=int, metavar="N", help="texts that are measured (default: 16)")
    parser.add_argument(
        "--length", type=int, metavar="L", help="tokens of a text (default: the original window, at most 8,192)"
    )
    parser.add_argument(
        "--rope", nargs="+", default=[], metavar="ROPE",
        help="other values of model.rope to measure beside the recipe's, written as in a recipe",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    from longred_megatron.analysis.layer_choice import NUM_TEXTS, layer_drift
    from longred_megatron.analysis.layer_study import KIND, layer_study, num_layers
    from longred_megatron.analysis.measure import ranks
    from longred_megatron.evaluation.report import check_output
    from longred_megatron.page import PAGE
    from longred_megatron.recipe import load_recipe, read_phases

    texts = NUM_TEXTS if options.texts is None else options.texts
    for key, value, least in (("texts", texts, 1), ("length", options.length, 2)):
        if value is not None and not least <= value <= 2**20:
            raise UserError(f"--{key} {value}: must be {least} to {2**20:,}")
    phase = read_phases(load_recipe(options.recipe, options.overrides))[-1]
    kept = [override for override in options.overrides if not override.startswith("model.rope")]
    others = [load_recipe(options.recipe, [*kept, f"model.rope={text}"]).model.rope for text in options.rope]
    if options.output:
        report_beside(options.output)
    with ranks() as team:
        if options.output:
            team.check(lambda: check_output(options.output, KIND))
        found = layer_drift(phase, texts, options.length, others, team)
    if not team.is_main:
        return
    count = num_layers(phase)
    study = layer_study(phase, found, count)
    print(study.text(), flush=True)
    if options.output:
        study.write(options.output)
        found.write(options.output, count)
        print(f"\nwritten: {options.output / PAGE}, {options.output / 'drift.json'}")


if __name__ == "__main__":
    run_cli(main)
