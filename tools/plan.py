#!/usr/bin/env python
"""Whether a recipe's run fits into the GPUs' memory, how long it takes, and what limits it; before it queues.

Reads the recipe and the models' config.json, nothing else, and needs no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.device import force_cpu
from longred_megatron.errors import UserError, run_cli

MOST_GPUS = 1_000_000

EXAMPLES = """examples:
  # the recipe's own layout on eight H100
  python tools/plan.py recipes/llama3_8b_32k_longred_c.yaml --gpu h100-80gb --gpus 8

  # another layout, with plan.json and a page
  python tools/plan.py recipes/llama3_8b_32k_longred_c.yaml parallel.tensor=4 parallel.context=1 \\
      --gpu h100-80gb --gpus 16 --output plan

  # the fastest layouts on 64 GPUs, with the settings of the first; without --gpus, on as few as possible
  python tools/plan.py recipes/llama3_8b_32k_longred_c.yaml --gpu h100-80gb --gpus 64 --search

--gpu also takes FILE.yaml:NAME, a description of your own as in longred_megatron/planning/gpus.yaml. docs/planning.md
says how far the numbers can be trusted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError: a wrong recipe, GPU, number of GPUs, or model folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, as in training")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h100-80gb, a100-80gb, ..., or FILE.yaml:NAME")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the run; with --search, left out: the fewest")
    parser.add_argument("--search", action="store_true", help="try other layouts, and show the fastest that fit")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new or empty folder for plan.json, report.html, layout.yaml, rehearse.sh",
    )
    options = parser.parse_intermixed_args(sys.argv[1:] if arguments is None else arguments)
    if options.gpus is None and not options.search:
        raise UserError("--gpus is missing: how many the run has; or add --search to find the fewest")
    if options.gpus is not None and not 1 <= options.gpus <= MOST_GPUS:
        raise UserError(f"--gpus {options.gpus}: must be 1 to {MOST_GPUS:,}")
    force_cpu()
    from longred_megatron.planning.command import plan_run, search_layouts  # takes seconds

    run = search_layouts if options.search else plan_run
    print(run(options.recipe, options.overrides, options.gpu, options.gpus, options.output))


if __name__ == "__main__":
    run_cli(main)
