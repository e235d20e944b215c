"""Layouts of a run on so many GPUs: which fit, how long each takes, and why the others do not."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from longred_megatron.layout import Parallel
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.plan import GIB, PhasePlan, layout, plan_stages, stage_memories
from longred_megatron.recipe import Phase, check_phases, recipe_yaml

TENSOR, PIPELINE, CONTEXT = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (None, 2, 4)
RECOMPUTE = ("none", "selective", "full")
MOST_SHOWN = 10


@dataclass(frozen=True)
class Found:
    """A layout that fits: the plan of each phase."""

    plans: Sequence[PhasePlan]

    @property
    def hours(self) -> float:
        return sum(plan.hours for plan in self.plans)

    @property
    def needed_bytes(self) -> float:
        return max(plan.needed_bytes for plan in self.plans)


@dataclass(frozen=True)
class Outcome:
    """fitting: the fastest first. refused: layouts by the first problem that the recipe's checks found. too_large:
    layouts that need more memory than there is; least_bytes: what the smallest of them needs."""

    world_size: int
    fitting: Sequence[Found]
    refused: Counter[str]
    too_large: int
    least_bytes: float


def search(phases: Sequence[Phase], world_size: int, gpu: Gpu) -> Outcome:
    """Tries tensor, pipeline, virtual pipeline, context and data axes, and recomputation. Number formats, objectives
    and the micro-batch stay the recipe's; objectives hold whole sequences on a context rank where these share out."""
    fitting: list[Found] = []
    refused: Counter[str] = Counter()
    too_large, least = 0, float("inf")
    for parallel in layouts(phases[0], world_size, gpu):
        tried = [with_layout(phase, parallel, "full") for phase in phases]
        if problems := check_phases(tried, world_size, gpu=True):
            refused[problems[0]] += 1
            continue
        for recompute in RECOMPUTE:
            stages = [stage_memories(with_layout(phase, parallel, recompute), world_size) for phase in phases]
            needed = max(s.memory().peak.total for own in stages for s in own) + gpu.reserved_bytes
            if needed > gpu.memory_bytes:
                too_large, least = too_large + 1, min(least, needed)
            else:
                fitting.append(Found([plan_stages(own, world_size, gpu) for own in stages]))
    return Outcome(world_size, sorted(fitting, key=lambda each: each.hours), refused, too_large, least)


def fewest_gpus(phases: Sequence[Phase], gpu: Gpu, most: int) -> Outcome:
    """The search for the smallest power of two of GPUs, up to `most`, that a layout fits; the last one if none does."""
    size = 1
    while True:
        outcome = search(phases, size, gpu)
        if outcome.fitting or 2 * size > most:
            return outcome
        size *= 2


def layouts(phase: Phase, world_size: int, gpu: Gpu) -> Iterator[Parallel]:
    """Those whose replicas divide the world and the step's micro-batches. Tensor ranks stay within a node."""
    depth = phase.source.num_layers
    for tensor, context, pipeline, chunks in product(TENSOR, CONTEXT, PIPELINE, CHUNKS):
        ranks = tensor * context * pipeline
        stages = pipeline * (chunks or 1)
        if world_size % ranks or phase.recipe.num_microbatches % (world_size // ranks):
            continue
        if tensor > gpu.gpus_per_node or stages > depth or (chunks and pipeline == 1):
            continue
        yield Parallel(
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            virtual_pipeline=chunks,
            sequence=tensor > 1,
            overlap_param_gather=phase.recipe.parallel.overlap_param_gather,
        ).for_depth(depth)


def with_layout(phase: Phase, parallel: Parallel, recompute: str) -> Phase:
    """The phase in another layout."""
    recipe = phase.recipe
    objectives = {}
    for name, settings in recipe.objectives.items():
        shared_out = recipe.step.tokens_per_microbatch % (settings.sequence_length * parallel.context) == 0
        changes = {"whole_sequences": parallel.context > 1 and shared_out, "context_parallel": None}
        objectives[name] = settings.model_copy(update=changes)
    training = recipe.training.model_copy(update={"recompute": recompute})
    changed = {"parallel": parallel, "training": training, "objectives": objectives}
    return replace(phase, recipe=recipe.model_copy(update=changed))


def settings_of(found: Found) -> dict[str, Any]:
    """The recipe's values in this layout: all axes, so that they replace those of any recipe."""
    recipe = found.plans[0].phase.recipe
    axes = {"tensor", "pipeline", "virtual_pipeline", "layers_per_chunk", "context", "sequence"}
    return {
        "parallel": recipe.parallel.model_dump(mode="json", include=axes),
        "training": {"recompute": recipe.training.recompute},
        "objectives": {n: {"whole_sequences": o.whole_sequences} for n, o in recipe.objectives.items()},
    }


def overrides_of(found: Found) -> list[str]:
    """The same as KEY=VALUE of a command line."""
    settings = settings_of(found)
    values = {
        f"{section}.{key}": value for section in ("parallel", "training") for key, value in settings[section].items()
    }
    whole = {
        f"objectives.{name}.whole_sequences": each["whole_sequences"] for name, each in settings["objectives"].items()
    }
    return [
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in (values | whole).items()
    ]


def report(outcome: Outcome, gpu: Gpu) -> str:
    """The fastest layouts, the winner's settings, and why the others are not among them."""
    room = gpu.memory_bytes / GIB
    lines = []
    if outcome.fitting:
        lines += [f"{len(outcome.fitting)} layouts fit on {outcome.world_size} GPUs; the fastest:", _row(_HEADER)]
        for found in outcome.fitting[:MOST_SHOWN]:
            shape, plan = layout(found.plans[0]), found.plans[0]
            axes = [shape[key] or 1 for key in ("tensor", "pipeline", "virtual_pipeline", "context", "data")]
            numbers = [f"{found.hours:.2f}", f"{found.needed_bytes / GIB:.1f}", f"{plan.model_flops_utilization:.0%}"]
            lines.append(_row([*axes, shape["recompute"], *numbers]))
        lines += ["settings of the first:", recipe_yaml.dump(settings_of(outcome.fitting[0])).rstrip()]
    else:
        lines.append(f"no layout fits on {outcome.world_size} GPUs")
    if outcome.too_large:
        least = outcome.least_bytes / GIB
        lines.append(f"{outcome.too_large} layouts need more than {room:.1f} GiB a rank; the smallest {least:.1f} GiB")
    for problem, count in outcome.refused.most_common(3):
        lines.append(f"{count} not possible, such as: {problem}")
    return "\n".join(lines)


_HEADER = ("tensor", "pipeline", "virtual", "context", "data", "recompute", "hours", "GiB", "FLOPs")


def _row(cells: Sequence[Any]) -> str:
    return "".join(f"{cell!s:>10}" for cell in cells)
