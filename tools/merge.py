#!/usr/bin/env python
"""Merges a model with what was made of it: weights between the two, with the RoPE and the window of the second."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.device import force_cpu
from longred_megatron.errors import run_cli

EXAMPLES = """examples:
  # half-way between the original and the extended model
  python tools/merge.py --hf models/Meta-Llama-3-8B runs/llama3_8b_32k_long_cpt/hf --weight 0.5 --output merged

  # a sweep: merged/weight-0.3, merged/weight-0.5, merged/weight-0.7; then see which of them keeps and gains most
  python tools/merge.py --hf models/Meta-Llama-3-8B runs/llama3_8b_32k_long_cpt/hf \\
      --method spherical --weight 0.3 0.5 0.7 --output merged
  python tools/evaluate.py --hf models/Meta-Llama-3-8B merged/weight-* --output report

linear: (1 - W) original + W extended. spherical: along the great circle between the two, of each tensor as one vector.
Where they are nearly parallel, as the weights of a model and of what was trained from it often are, the two methods
differ little: the largest angle is printed. Tokenizer and config.json are those of the extended model. Needs no GPU,
and memory for a part of one tensor."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError: weights out of range, models that cannot be merged, or an output in use."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf", nargs=2, type=Path, required=True, metavar=("ORIGINAL", "EXTENDED"),
        help="Hugging Face folders: a model, and what was trained from it",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("linear", "spherical"), default="linear", help="default: %(default)s; see below"
    )
    parser.add_argument(
        "--weight", nargs="+", type=float, required=True, metavar="W",
        help="share of the extended model, 0 to 1; several: a model of each",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR",
        help="new or empty folder for the model; of several weights, DIR/weight-W for each",
    )  # fmt: skip
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    force_cpu()
    from longred_megatron.checkpoint.merging import merge  # takes seconds

    original, extended = options.hf
    for merged in merge(original, extended, options.output, options.method, options.weight):
        print(merged.summary(), flush=True)


if __name__ == "__main__":
    run_cli(main)
