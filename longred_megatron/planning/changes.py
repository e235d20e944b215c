"""Which single setting, changed on the command line, would save most of a run's hours."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from longred_megatron.errors import UserError
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.plan import Change, PhasePlan, plan_phase
from longred_megatron.planning.search import CHUNKS, CONTEXT, PIPELINE, RECOMPUTE, TENSOR
from longred_megatron.recipe import Recipe, check_phases, read_phases

LEAST_SHARE = 0.01  # of the hours; less is no reason to change a recipe


def best_changes(recipe: Recipe, plans: Sequence[PhasePlan], number: int = 3) -> list[Change]:
    """Of the layout, the recomputation, whole sequences and FP8; the fastest first, at most `number` of them.

    Those that the recipe's checks refuse, that do not fit, or that save less than LEAST_SHARE are left out.

    plans: of the recipe as it is.
    """
    own, found = sum(plan.hours for plan in plans), []
    for key, value in _candidates(recipe, plans[0].gpu):
        hours = _hours(_changed(recipe, key, value), plans[0].world_size, plans[0].gpu)
        if hours is not None and hours < (1 - LEAST_SHARE) * own:
            found.append(Change(f"{key}={'true' if value is True else value or 'null'}", hours))
    return sorted(found, key=lambda change: change.hours)[:number]


def _candidates(recipe: Recipe, gpu: Gpu) -> Iterator[tuple[str, Any]]:
    yield from (("parallel.tensor", n) for n in TENSOR if n <= gpu.gpus_per_node)
    yield from (("parallel.pipeline", n) for n in PIPELINE)
    yield from (("parallel.context", n) for n in CONTEXT)
    yield from (("parallel.virtual_pipeline", n) for n in CHUNKS)
    yield "parallel.sequence", True
    yield from (("training.recompute", how) for how in RECOMPUTE)
    if recipe.parallel.context > 1:
        yield from ((f"objectives.{name}.whole_sequences", True) for name in recipe.objectives)
    if gpu.fp8_flops:
        yield "precision.fp8", "hybrid"


def _changed(recipe: Recipe, key: str, value: Any) -> dict[str, Any]:
    """The recipe's values with another one of a key."""
    values = recipe.model_dump(mode="json")
    *sections, last = key.split(".")
    at = values
    for section in sections:
        at = at[section]
    at[last] = value
    return values


def _hours(values: dict[str, Any], world_size: int, gpu: Gpu) -> float | None:
    """Of the whole run; None where it is not sound or does not fit."""
    try:
        phases = read_phases(Recipe.model_validate(values))
    except (ValidationError, UserError):
        return None
    if check_phases(phases, world_size, gpu=True):
        return None
    plans = [plan_phase(phase, world_size, gpu) for phase in phases]
    return sum(plan.hours for plan in plans) if all(plan.fits for plan in plans) else None
