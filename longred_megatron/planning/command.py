"""What `tools/plan.py` does."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import UserError
from longred_megatron.files import appearing_folder, try_output, write_text
from longred_megatron.page import PAGE
from longred_megatron.planning import search
from longred_megatron.planning.candidate import Candidate
from longred_megatron.planning.changes import best_changes
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.page import page
from longred_megatron.planning.plan import Change, PhasePlan, plan_phase, report, to_json
from longred_megatron.recipe import check_phases, load_recipe, read_phases, recipe_yaml

PLAN, SETTINGS, REHEARSALS = "plan.json", "layout.yaml", "rehearse.sh"
MOST_GPUS = 4096


def plan_run(recipe: Path, overrides: Sequence[str], gpu_name: str, num_gpus: int, output: Path | None) -> str:
    """The report of the recipe's own layout; with `output`, plan.json and the page in a new folder.

    Raises:
        UserError: as `load_recipe`, `read_phases`, `read_gpu`, `check_phases`; the folder is in use.
    """
    gpu = read_gpu(gpu_name)
    loaded = load_recipe(recipe, overrides)
    phases = read_phases(loaded)
    if problems := check_phases(phases, num_gpus, gpu=True):
        raise UserError(*problems)
    _check(output)
    plans = [plan_phase(phase, num_gpus, gpu) for phase in phases]
    changes = best_changes(loaded, plans)
    if output is not None:
        _write(output, plans, changes)
    return report(plans, changes)


def search_layouts(
    recipe: Path, overrides: Sequence[str], gpu_name: str, num_gpus: int | None, output: Path | None
) -> str:
    """The fastest layouts on so many GPUs; None: on the fewest that one fits. With `output`, the first one's
    plan.json, layout.yaml, a page, and rehearse.sh with a command for each that is shown, in a new folder.

    Raises:
        UserError: as `plan_run`; no layout fits.
    """
    gpu = read_gpu(gpu_name)
    phases = read_phases(load_recipe(recipe, overrides))
    _check(output)
    found = search.fewest_gpus(phases, gpu, MOST_GPUS) if num_gpus is None else search.search(phases, num_gpus, gpu)
    shown = search.report(found, gpu)
    if not found.fitting:
        raise UserError(shown)
    first = found.fitting[0]
    rehearsals = [_rehearsal(recipe, overrides, each) for each in search.shown(found)]
    if output is not None:
        _write(output, first.plans, found=found, rehearsals=rehearsals)
    return f"{shown}\n\nrehearse the first on a CPU:\n{rehearsals[0]}\n\n{report(first.plans)}"


def _rehearsal(recipe: Path, overrides: Sequence[str], found: Candidate) -> str:
    """The command that runs a layout on a CPU, with tiny widths."""
    changed = search.overrides_of(found)
    keys = {each.split("=")[0] for each in changed}
    kept = [each for each in overrides if each.split("=")[0] not in keys]
    words = ["python", "-m", "longred_megatron.train", str(recipe), *kept, *changed]
    return shlex.join([*words, "--rehearse"])


def _check(output: Path | None) -> None:
    if output is None:
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is in use; choose a new or empty folder")
    try_output(output, "--output")


def _write(
    output: Path,
    plans: Sequence[PhasePlan],
    changes: Sequence[Change] = (),
    found: search.Outcome | None = None,
    rehearsals: Sequence[str] = (),
) -> None:
    with appearing_folder(output) as partial:
        write_text(partial / PLAN, json.dumps(to_json(plans, changes), indent=1))
        write_text(partial / PAGE, page(plans, changes, found))
        if rehearsals:
            write_text(
                partial / REHEARSALS, "\n".join(["set -e  # one of each layout that was shown", *rehearsals, ""])
            )
        if found is not None:
            write_text(partial / SETTINGS, recipe_yaml.dump(search.settings_of(found.fitting[0])))
