#!/usr/bin/env python
"""Converts checkpoints between Hugging Face folders and Megatron's distributed format, and compares them.

Runs on the CPU in one process; it needs memory for one copy of the model, `verify` for two in fp32.

Examples:
    python tools/convert_checkpoint.py hf-to-megatron --hf models/Llama-3-8B --output checkpoints/llama3
    python tools/convert_checkpoint.py verify         --hf models/Llama-3-8B --checkpoint checkpoints/llama3
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint runs/a/checkpoints/step-000512 --output hf
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.device import force_cpu
from longred_megatron.errors import UserError, run_cli

# Of the largest logit, where that is more than 1: what fp32 sums in another order may differ by.
LOGIT_TOLERANCE = 1e-4


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="convert_checkpoint.py",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hf_help = "Hugging Face folder with config.json and safetensors"
    output_help = "folder to write; must not exist, or be empty"
    to_megatron = commands.add_parser("hf-to-megatron", help="writes a checkpoint that any layout can load")
    to_megatron.add_argument("--hf", type=Path, required=True, metavar="DIR", help=hf_help)
    to_megatron.add_argument("--output", type=Path, required=True, metavar="DIR", help=output_help)
    to_hf = commands.add_parser("megatron-to-hf", help="exports a converted or a training checkpoint")
    checkpoint_help = "folder that hf-to-megatron wrote, or RUN/checkpoints/step-NNNNNN"
    to_hf.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=checkpoint_help)
    to_hf.add_argument("--output", type=Path, required=True, metavar="DIR", help=output_help)
    compare = commands.add_parser("verify", help="compares every tensor bit by bit, then logits in fp32")
    compare.add_argument("--hf", type=Path, required=True, metavar="DIR", help=hf_help)
    compare.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=checkpoint_help)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError, also where `verify` finds a difference."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    force_cpu()  # a model may be larger than one GPU
    from longred_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf, verify_checkpoint

    if options.command == "hf-to-megatron":
        hf_to_megatron(options.hf, options.output)
        print(f"{options.output}: written")
    elif options.command == "megatron-to-hf":
        megatron_to_hf(options.checkpoint, options.output)
        print(f"{options.output}: written")
    else:
        found = verify_checkpoint(options.hf, options.checkpoint)
        print(f"tensors: {found.num_tensors - len(found.different)} of {found.num_tensors} equal bit by bit")
        print(f"logits: differ by at most {found.max_logit_difference:.2e} (largest: {found.max_logit:.2f})")
        problems = [f"{name}: differs" for name in found.different]
        if not found.max_logit_difference <= LOGIT_TOLERANCE * max(1.0, found.max_logit):  # NaN is a difference
            problems.append(
                f"logits differ by more than {LOGIT_TOLERANCE}: check rope and norm settings in config.json"
            )
        if problems:
            raise UserError(*problems)


if __name__ == "__main__":
    run_cli(main)
