"""What `tools/plan.py` does."""

import json
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import UserError
from longred_megatron.files import appearing_folder, try_output, write_text
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.plan import plan_phase, report, to_json
from longred_megatron.recipe import check_phases, load_recipe, read_phases

PLAN = "plan.json"


def plan_run(recipe: Path, overrides: Sequence[str], gpu_name: str, num_gpus: int, output: Path | None) -> str:
    """The report of the recipe's own layout; with `output`, plan.json in a new folder.

    Raises:
        UserError: as `load_recipe`, `read_phases`, `read_gpu`, `check_phases`; the folder is in use.
    """
    gpu = read_gpu(gpu_name)
    phases = read_phases(load_recipe(recipe, overrides))
    if problems := check_phases(phases, num_gpus, gpu=True):
        raise UserError(*problems)
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"--output {output}: is in use; choose a new or empty folder")
        try_output(output, "--output")
    plans = [plan_phase(phase, num_gpus, gpu) for phase in phases]
    if output is not None:
        with appearing_folder(output) as partial:
            write_text(partial / PLAN, json.dumps(to_json(plans), indent=1))
    return report(plans)
