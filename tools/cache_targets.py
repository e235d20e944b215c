#!/usr/bin/env python
"""Computes what a recipe's teachers say and keeps it in their cache, so that the run itself need not."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from longred_megatron.errors import UserError, run_cli
from longred_megatron.parallel.world import world

if TYPE_CHECKING:
    from longred_megatron.recipe import Phase, Recipe
    from longred_megatron.training.microbatches import MicroBatchSource

EXAMPLES = """examples:
  python tools/cache_targets.py recipes/tiny_longred_c.yaml teacher.cache=runs/targets
  torchrun --nproc-per-node 8 tools/cache_targets.py recipes/llama3_8b_32k_longred_c.yaml teacher.cache=/disk/targets

  # the steps shared out over machines, in any layout
  torchrun --nproc-per-node 8 tools/cache_targets.py recipes/llama3_8b_32k_longred_c.yaml teacher.cache=/disk/targets \\
      --steps 1-500 parallel.context=1 parallel.tensor=1

The run reads it with the same `teacher.cache`, in any layout: as does any other run with the same teacher on the same
texts and positions. Stopped, it goes on where it was; what is there is checked, and damaged files are made again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError for a recipe that is not sound, or without a cache, and for steps that it does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--steps", metavar="FIRST-LAST", help="of the run (default: all)")
    options = parser.parse_intermixed_args(arguments)
    rank, world_size = world(os.environ)
    from longred_megatron.analysis.auto_layers import agreed
    from longred_megatron.parallel.groups import destroy, initialize
    from longred_megatron.recipe.auto_layers import auto_counts
    from longred_megatron.training.cache_filling import check_cache, fill

    try:
        recipe, phases, data = _check(options.recipe, options.overrides, rank == 0, world_size)
        steps = check_cache(phases, _steps(options.steps))
    except UserError:
        if rank == 0:
            raise
        time.sleep(5)  # every rank finds the same mistake; the first one tells, before torchrun ends the others
        sys.exit(2)
    undecided = auto_counts(recipe)
    groups = initialize(recipe.parallel, recipe.training.seed, timedelta(minutes=30))
    if undecided:
        recipe, phases, data = agreed(recipe)
    there, computed = fill(phases, data, groups, steps)
    if rank == 0:
        whose = "" if groups.dp.size() == 1 else " of this replica"
        print(f"{there + computed} micro-batches{whose}: {computed} computed, {there} were there")
    destroy()


def _steps(text: str | None) -> range | None:
    if text is None:
        return None
    if not (found := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)):
        raise UserError(f"--steps {text!r}: must be two numbers such as 1-500, or one")
    first, last = int(found[1]), int(found[2] or found[1])
    return range(first, last + 1)


def _check(
    path: Path, overrides: Sequence[str], is_main: bool, world_size: int
) -> "tuple[Recipe, list[Phase], list[MicroBatchSource]]":
    from longred_megatron.analysis.auto_layers import choose_layers, with_recorded_layers
    from longred_megatron.files import try_output
    from longred_megatron.planning.cache_size import cache_lines
    from longred_megatron.recipe import check_phases, load_recipe, read_phases
    from longred_megatron.training.microbatches import open_data

    recipe = with_recorded_layers(load_recipe(path, overrides))
    phases = read_phases(recipe)
    if problems := check_phases(phases, world_size):
        raise UserError(*problems)
    data = open_data(phases)
    if is_main:
        for phase in phases:
            for folder in phase.caches().values():
                try_output(folder / "values", "teacher.cache")
        recipe = choose_layers(recipe, phases[-1])
        phases = read_phases(recipe)
        print(*cache_lines(phases), sep="\n", flush=True)
    return recipe, phases, data


if __name__ == "__main__":
    run_cli(main)
