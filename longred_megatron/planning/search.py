"""Layouts of a run on so many GPUs: which fit, how long each takes, and why the others do not."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from longred_megatron.layout import Parallel
from longred_megatron.planning.balance import balanced, least_hours, may_fit
from longred_megatron.planning.candidate import Candidate
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.plan import GIB, layout
from longred_megatron.recipe import Phase, check_phases, recipe_yaml

TENSOR, PIPELINE, CONTEXT = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (None, 2, 4)
RECOMPUTE = ("none", "selective", "full")
FP8 = "hybrid"
MOST_SHOWN, MOST_FP8_SHOWN = 10, 3


@dataclass(frozen=True)
class Outcome:
    """fitting: the fastest first, with the recipe's number formats. with_fp8: the fastest with FP8 products, where the
    recipe has none and the GPU can. refused: layouts by the first problem that the recipe's checks found. too_large:
    those that need more memory than there is; least_bytes: what the smallest of them needs."""

    world_size: int
    fitting: Sequence[Candidate]
    with_fp8: Sequence[Candidate]
    refused: Counter[str]
    too_large: int
    least_bytes: float


def search(phases: Sequence[Phase], world_size: int, gpu: Gpu) -> Outcome:
    """Tries tensor, pipeline, virtual pipeline, context and data axes and recomputation; of the fastest, the layers of
    each chunk, and FP8. Objectives and the micro-batch stay the recipe's; objectives hold whole sequences on a context
    rank where these share out."""
    grid, refused = _grid(phases, world_size, gpu)
    shrunk = [balanced(each) if not each.fits and may_fit(each) else each for each in grid]
    fitting = [each for each in shrunk if each.fits]
    faster = dict(_improved(fitting, MOST_SHOWN, least_hours, balanced))
    fitting = sorted((faster.get(each, each) for each in fitting), key=lambda each: each.hours)
    too_large = [each for each in shrunk if not each.fits]
    can_change = gpu.fp8_flops is not None and not any(phase.recipe.precision.fp8 for phase in phases)
    return Outcome(
        world_size,
        fitting,
        _with_fp8(fitting, too_large) if can_change else [],
        refused,
        len(too_large),
        min((each.needed_bytes for each in too_large), default=float("inf")),
    )


def fewest_gpus(phases: Sequence[Phase], gpu: Gpu, most: int) -> Outcome:
    """The search for the smallest power of two of GPUs, up to `most`, that a layout fits; the last one if none does."""
    size = 1
    while True:
        outcome = search(phases, size, gpu)
        if outcome.fitting or 2 * size > most:
            return outcome
        size *= 2


def _grid(phases: Sequence[Phase], world_size: int, gpu: Gpu) -> tuple[list[Candidate], Counter[str]]:
    """All layouts with equal chunks, and how many each problem refuses."""
    found: list[Candidate] = []
    refused: Counter[str] = Counter()
    for parallel in layouts(phases[0], world_size, gpu):
        tried = [Candidate([_with_layout(p, parallel, how) for p in phases], world_size, gpu) for how in RECOMPUTE]
        if problems := check_phases(tried[-1].phases, world_size, gpu=True):
            refused[problems[0]] += 1
        else:
            found += tried
    return found, refused


def _improved(
    candidates: Sequence[Candidate],
    number: int,
    least: Callable[[Candidate], float],
    improve: Callable[[Candidate], Candidate | None],
) -> Iterator[tuple[Candidate, Candidate]]:
    """Each candidate with what `improve` makes of it, as far as one may be among the `number` fastest of these.

    least: hours that it cannot be faster than.
    """
    hours: list[float] = []
    for bound, _, each in sorted((least(each), at, each) for at, each in enumerate(candidates)):
        if len(hours) >= number and bound >= sorted(hours)[number - 1]:
            return
        if (better := improve(each)) is not None:
            hours.append(better.hours)
            yield each, better


def _with_fp8(fitting: Sequence[Candidate], too_large: Sequence[Candidate]) -> list[Candidate]:
    """The fastest with FP8 products, which may also fit where bf16 does not."""
    found = [each for _, each in _improved(fitting, MOST_FP8_SHOWN, _least_hours_in_fp8, _in_fp8)]
    found += [each for each in map(_in_fp8, too_large) if each is not None]
    return sorted(found, key=lambda each: each.hours)[:MOST_FP8_SHOWN]


def _in_fp8(candidate: Candidate) -> Candidate | None:
    changed = candidate.changed(precision={"fp8": FP8})
    if check_phases(changed.phases, changed.world_size, gpu=True) or not may_fit(changed):
        return None
    changed = balanced(changed)
    return changed if changed.fits else None


def _least_hours_in_fp8(candidate: Candidate) -> float:
    return sum(plan.least_hours_in_fp8 for plan in candidate.plans)


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


def _with_layout(phase: Phase, parallel: Parallel, recompute: str) -> Phase:
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


def settings_of(found: Candidate) -> dict[str, Any]:
    """The recipe's values in this layout: all axes, so that they replace those of any recipe."""
    recipe = found.phases[0].recipe
    axes = {"tensor", "pipeline", "virtual_pipeline", "layers_per_chunk", "context", "sequence"}
    fp8 = {"precision": {"fp8": recipe.precision.fp8}} if recipe.precision.fp8 else {}
    return {
        "parallel": recipe.parallel.model_dump(mode="json", include=axes),
        "training": {"recompute": recipe.training.recompute},
        **fp8,
        "objectives": {n: {"whole_sequences": o.whole_sequences} for n, o in recipe.objectives.items()},
    }


def overrides_of(found: Candidate) -> list[str]:
    """The same as KEY=VALUE of a command line."""
    settings = settings_of(found)
    objectives = settings.pop("objectives")
    values = {f"{section}.{key}": value for section, own in settings.items() for key, value in own.items()}
    values |= {f"objectives.{name}.{key}": value for name, own in objectives.items() for key, value in own.items()}
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in values.items()]


def shown(outcome: Outcome) -> list[Candidate]:
    """Those that the report has a line for, in its order."""
    return [*outcome.fitting[:MOST_SHOWN], *outcome.with_fp8]


def report(outcome: Outcome, gpu: Gpu) -> str:
    """The fastest layouts, the winner's settings, and why the others are not among them."""
    room = gpu.memory_bytes / GIB
    lines = []
    if outcome.fitting:
        lines += [f"{len(outcome.fitting)} layouts fit on {outcome.world_size} GPUs; the fastest:", _row(_HEADER)]
        lines += map(_line, outcome.fitting[:MOST_SHOWN])
        lines += ["settings of the first:", recipe_yaml.dump(settings_of(outcome.fitting[0])).rstrip()]
    else:
        lines.append(f"no layout fits on {outcome.world_size} GPUs")
    if outcome.with_fp8:
        lines += [
            f"with precision.fp8={FP8}, which changes what is computed (docs/gpu.md); the fastest:",
            _row(_HEADER),
        ]
        lines += map(_line, outcome.with_fp8)
    if outcome.too_large:
        least = outcome.least_bytes / GIB
        lines.append(f"{outcome.too_large} layouts need more than {room:.1f} GiB a rank; the smallest {least:.1f} GiB")
    for problem, count in outcome.refused.most_common(3):
        lines.append(f"{count} not possible, such as: {problem}")
    return "\n".join(lines)


def _line(found: Candidate) -> str:
    shape, plan = layout(found.plans[0]), found.plans[0]
    axes = [shape[key] or 1 for key in ("tensor", "pipeline", "virtual_pipeline", "context", "data")]
    numbers = [f"{found.hours:.2f}", f"{found.needed_bytes / GIB:.1f}", f"{plan.model_flops_utilization:.0%}"]
    sizes = shape["layers_per_chunk"]
    return _row([*axes, shape["recompute"], *numbers]) + (f"  layers {sizes}" if sizes else "")


_HEADER = ("tensor", "pipeline", "virtual", "context", "data", "recompute", "hours", "GiB", "FLOPs")


def _row(cells: Sequence[Any]) -> str:
    return "".join(f"{cell!s:>10}" for cell in cells)
