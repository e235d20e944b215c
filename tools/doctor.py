#!/usr/bin/env python
"""Looks whether these machines can be trusted with a recipe: software, links, layout, causality, documents, resume.

It runs the recipe's layout at tiny widths with random weights and texts on the ranks that torchrun starts (GPUs where
there are any, else CPUs), and compares; at the end the real widths, where they fit. Of models only config.json has to
be there. Under 10 minutes. What cannot be looked at is said to be not tried, never to be fine.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from longred_megatron.errors import UserError, repeat_below_torchrun, report_beside, run_cli
from longred_megatron.parallel.world import world

EXAMPLES = """examples:
  # on the machines and with the layout of the run to come
  torchrun --nproc-per-node 8 tools/doctor.py recipes/llama3_8b_32k_longred_c.yaml --output doctor

  # another layout
  torchrun --nproc-per-node 4 tools/doctor.py recipes/tiny_longred_c.yaml parallel.tensor=2 parallel.pipeline=2

  # a world of one: for a recipe whose layout is of one rank
  python tools/doctor.py recipes/tiny_longred_c.yaml

exit code: 0 if no fault was found, 1 if one was, 2 for a mistake in the recipe or the command.
The output folder gets doctor.html, one page, and results.json with every number. It must be new, empty, or hold an
earlier examination."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the page and the numbers (rank 0 writes)"
    )
    options = parser.parse_intermixed_args(arguments)
    is_main = world(os.environ)[0] == 0
    try:
        healthy = _examine(options, shlex.join(["tools/doctor.py", *arguments]), is_main)
    except UserError:
        if is_main:
            raise
        time.sleep(5)  # every rank finds the same mistake; the first one tells, before torchrun ends the others
        sys.exit(2)
    if not healthy:
        sys.exit(1)


def _examine(options: argparse.Namespace, command: str, is_main: bool) -> bool:
    from longred_megatron.doctor.examination import examine, is_healthy, leave, verdict  # takes seconds
    from longred_megatron.doctor.page import KIND, PAGE, write
    from longred_megatron.evaluation.report import check_output
    from longred_megatron.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.output and is_main:
        report_beside(options.output)
        check_output(options.output, KIND)
    started = time.perf_counter()
    sections = examine(recipe, lambda line: print(line, flush=True))
    if is_main:
        seconds = time.perf_counter() - started
        if options.output:
            write(options.output, sections, recipe, command, seconds)
            print(f"\n{options.output / PAGE} has all of it")
        last_word = f"{verdict(sections)} ({seconds:.0f} s)"
        print(f"\n{last_word}", flush=True)
        if not is_healthy(sections):
            repeat_below_torchrun(last_word)
    leave()  # torchrun ends all ranks when the first one ends with a fault
    return is_healthy(sections)


if __name__ == "__main__":
    run_cli(main)
