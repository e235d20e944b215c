"""The training command: `torchrun --nproc-per-node N -m longred_megatron.train RECIPE [key=value ...]`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from longred_megatron.device import force_cpu
from longred_megatron.errors import UserError, first_few, report_beside, run_cli
from longred_megatron.parallel.world import world

if TYPE_CHECKING:  # here and below: torch and Megatron take seconds to import, and --help needs neither
    from longred_megatron.recipe import Phase, Recipe
    from longred_megatron.training.microbatches import MicroBatchSource

_EXAMPLES = """examples:
  python -m longred_megatron.train recipes/tiny_longred_c.yaml
  torchrun --nproc-per-node 8 -m longred_megatron.train recipes/llama3_8b_32k_longred_c.yaml
  torchrun --nproc-per-node 8 -m longred_megatron.train recipes/llama3_8b_32k_longred_c.yaml \\
      training.steps=100 parallel.tensor=4 run.dir=runs/try
  python -m longred_megatron.train recipes/llama3_8b_32k_longred_c.yaml --rehearse

A run goes on from the newest checkpoint in its run.dir. SIGTERM or Ctrl-C saves a checkpoint and stops."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the recipe, its model, its data and its run folder before a process group exists; then trains."""
    parser = argparse.ArgumentParser(
        prog="python -m longred_megatron.train",
        description="Gives a Hugging Face model a longer context window, as a recipe says.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on a CPU: the same layout, objectives and code path with tiny widths and random texts; of the model only "
        "config.json is needed; starts its ranks itself, writes nothing that stays",
    )
    options = parser.parse_intermixed_args(arguments)
    rank, world_size = world(os.environ)
    is_main = rank == 0
    if options.rehearse:
        if is_main:  # under torchrun too: the first rank starts a world of its own
            _rehearse(options.recipe, options.overrides)
        return
    from longred_megatron.recipe.auto_layers import auto_counts

    try:
        recipe, phases, data = _check(options.recipe, options.overrides, is_main, world_size)
        undecided = auto_counts(recipe)
        if is_main:
            recipe, phases = _announce(recipe, phases, data, world_size)
    except UserError:
        if is_main:
            raise
        time.sleep(5)  # every rank finds the same mistake; the first one tells, before torchrun ends the others
        sys.exit(2)

    from longred_megatron.analysis.auto_layers import agreed
    from longred_megatron.files import reason
    from longred_megatron.parallel.groups import destroy, initialize
    from longred_megatron.training.run import train
    from longred_megatron.training.run_folder import check_run_folder
    from longred_megatron.training.run_lock import RunLock

    report_beside(recipe.run.dir)
    # The watchdog names the rank that hangs; the groups' own limit, which names none, has to be the longer one.
    patience = timedelta(minutes=max(30, 2 * recipe.training.hang_minutes))
    with RunLock(recipe.run.dir) if is_main else nullcontext():
        if is_main:
            check_run_folder(recipe)  # again: another run may have begun or ended since
        groups = initialize(recipe.parallel, recipe.training.seed, patience)
        try:
            if undecided:
                recipe, phases, data = agreed(recipe)
            train(recipe, phases, data, groups)
        except OSError as error:
            raise UserError(f"{error.filename or recipe.run.dir}: {reason(error)}; the run has ended") from error
        finally:
            # After a failure the other ranks are in collectives, for which NCCL would wait before it left the world.
            if world_size == 1 or sys.exception() is None:
                destroy()


def _rehearse(path: Path, overrides: Sequence[str]) -> None:
    force_cpu()  # on a GPU node too
    from longred_megatron.recipe import load_recipe
    from longred_megatron.training.rehearsal import rehearse

    rehearse(load_recipe(path, overrides))


def _check(
    path: Path, overrides: Sequence[str], is_main: bool, world_size: int
) -> "tuple[Recipe, list[Phase], list[MicroBatchSource]]":
    """Everything that can be wrong before ranks talk to each other."""
    from longred_megatron.analysis.auto_layers import with_recorded_layers
    from longred_megatron.recipe import check_phases, load_recipe, read_phases

    recipe = with_recorded_layers(load_recipe(path, overrides))
    phases = read_phases(recipe)
    problems = check_phases(phases, world_size)
    if problems:
        raise UserError(*problems)

    from longred_megatron.files import try_output
    from longred_megatron.training.microbatches import open_data
    from longred_megatron.training.run_folder import check_run_folder

    if Path(os.path.realpath(path)).parent == Path(os.path.realpath(recipe.run.dir)):
        raise UserError(f"run.dir: {recipe.run.dir} is the folder of the recipe itself; choose another folder")
    check_run_folder(recipe)
    if is_main:
        try_output(recipe.run.dir, "run.dir")
        for phase in phases:
            if phase.recipe.debug.dump_microbatches:
                try_output(phase.recipe.debug.dump_microbatches / "step", "debug.dump_microbatches")
            for folder in phase.caches().values():
                try_output(folder / "values", "teacher.cache")
    data = open_data(phases)
    if is_main:
        _check_models(recipe, phases)
    return recipe, phases, data


def _announce(
    recipe: "Recipe", phases: "list[Phase]", data: "Sequence[MicroBatchSource]", world_size: int
) -> "tuple[Recipe, list[Phase]]":
    """Chooses layers where the recipe leaves them open, and prints the start-up arithmetic.

    Raises:
        UserError: as `choose_layers` and `_choose_attention`.
    """
    from longred_megatron.analysis.auto_layers import choose_layers
    from longred_megatron.data.sequences import without_start_token
    from longred_megatron.device import bf16_is_slow, on_gpu
    from longred_megatron.planning.summary import phases_summary
    from longred_megatron.recipe import read_phases

    recipe = choose_layers(recipe, phases[-1])
    phases = read_phases(recipe)
    print(phases_summary(phases, world_size, on_gpu()))
    if recipe.precision.params == "bf16" and bf16_is_slow():
        print("bf16 is slow: this CPU has no instructions for it; precision.params=fp32 takes a fraction of the time")
    _choose_attention(phases)
    padding = {prefix: share for own in data for prefix, share in own.padding_fractions().items()}
    for prefix, share in padding.items():
        print(f"packed {prefix}: {share:.2%} of its windows is padding")
    prefixes = dict.fromkeys(prefix for own in data for prefix in own.prefixes())
    if other := [prefix for prefix in prefixes if without_start_token(prefix)]:
        print(
            f"no start token: the documents of {first_few(other)} have none, and the tokenizer opens every text with "
            "one, in evaluation too; to train as the model is used, prepare them with --bos"
        )
    sys.stdout.flush()
    return recipe, phases


def _choose_attention(phases: "Sequence[Phase]") -> None:
    """Prints which attention Transformer Engine will take on this GPU; the first rank's stand for all.

    Raises:
        UserError: none takes what an objective needs.
    """
    from longred_megatron.device import on_gpu

    if not on_gpu():
        return
    from longred_megatron.model.attention_backends import attention_choices, attention_problems

    choices = list(dict.fromkeys(choice for phase in phases for choice in attention_choices(phase)))
    if problems := attention_problems(choices):
        raise UserError(*problems)
    print("attention:", *choices, sep="\n  ")


def _check_models(recipe: "Recipe", phases: "Sequence[Phase]") -> None:
    """Student and teachers against their weight files, each other's tokenizer and the data, before the first phase."""
    from longred_megatron.checkpoint.weight_files import WeightFiles
    from longred_megatron.data.sequences import check_tokens
    from longred_megatron.data.tokenizer import check_same_tokenizer

    models = {recipe.model.hf: phases[0].source}
    for phase in phases:
        models |= phase.teachers
    for hf, architecture in models.items():
        with WeightFiles(hf) as files:
            files.check(architecture)
        check_same_tokenizer(recipe.model.hf, hf)
    vocab_size = min(architecture.vocab_size for architecture in models.values())
    prefixes = [prefix for phase in phases for blend in phase.recipe.data.values() for prefix in blend]
    for prefix in dict.fromkeys(prefixes):
        check_tokens(prefix, vocab_size)


if __name__ == "__main__":
    run_cli(main)
