"""A run's plan: whether it fits, how long it takes, and what of each is made of which part."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from longred_megatron.planning.flops import step_flops
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.memory import RankMemory, StageMemory
from longred_megatron.planning.operations import FUSED
from longred_megatron.planning.simulation import Timed, simulate
from longred_megatron.planning.timing import StageTime
from longred_megatron.recipe import Phase

GIB = 2**30
AXES = ("tensor", "context", "pipeline", "data")
BUBBLE = "pipeline bubble and messages"
FASTER_IN_FP8 = ("matrix products", "recomputation", "starting operations", BUBBLE)  # parts of a step


@dataclass(frozen=True)
class PhasePlan:
    """Of one phase of a run. Bytes are of one rank of each pipeline stage, seconds of a step.

    from_caches: the same with teacher caches that have everything; None where there are none.
    """

    phase: Phase
    world_size: int
    gpu: Gpu
    memory: Sequence[RankMemory]
    step_seconds: float
    seconds_by_part: Mapping[str, float]
    communication_bytes: Mapping[str, float]
    timeline: Sequence[Sequence[Timed]] = field(repr=False)
    order: Sequence[str] = field(repr=False)
    from_caches: "PhasePlan | None" = field(default=None, repr=False)

    @property
    def fullest(self) -> RankMemory:
        """The stage whose ranks need most."""
        return max(self.memory, key=lambda each: each.peak.total)

    @property
    def needed_bytes(self) -> float:
        """Of the fullest rank, with what a process takes beside tensors."""
        return self.fullest.peak.total + self.gpu.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.gpu.memory_bytes

    @property
    def step_tokens(self) -> int:
        recipe = self.phase.recipe
        return recipe.num_microbatches * recipe.step.tokens_per_microbatch

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.step_tokens / self.step_seconds / self.world_size

    @property
    def model_flops_utilization(self) -> float:
        """Against the dense bf16 peak, as training reports it."""
        return step_flops(self.phase) / self.step_seconds / self.world_size / self.gpu.bf16_flops

    @property
    def hours(self) -> float:
        """Of the whole phase, without checkpoints, evaluation and starting."""
        return self.step_seconds * self.phase.recipe.training.steps / 3600

    @property
    def least_hours_in_fp8(self) -> float:
        """Not more than those with FP8 products: as if all that waits for products became as much faster as these."""
        assert self.gpu.fp8_flops is not None
        faster = sum(seconds for part, seconds in self.seconds_by_part.items() if part in FASTER_IN_FP8)
        saved = faster * (1 - self.gpu.bf16_flops / self.gpu.fp8_flops)
        return (self.step_seconds - saved) * self.phase.recipe.training.steps / 3600


class Change(NamedTuple):
    """A setting that would make the run faster. override: as on the command line. hours: of the run with it."""

    override: str
    hours: float


def plan_phase(phase: Phase, world_size: int, gpu: Gpu) -> PhasePlan:
    """The plan of a phase in which `check_phase` has found no problem."""
    plan = plan_stages(stage_memories(phase, world_size), world_size, gpu)
    if not phase.caches():
        return plan
    full = plan_stages(stage_memories(phase.with_full_caches, world_size), world_size, gpu)
    return replace(plan, from_caches=full)


def stage_memories(phase: Phase, world_size: int) -> list[StageMemory]:
    """Of every pipeline stage, on a GPU."""
    return [StageMemory(phase, world_size, stage, FUSED) for stage in range(phase.recipe.parallel.pipeline)]


def plan_stages(stages: Sequence[StageMemory], world_size: int, gpu: Gpu) -> PhasePlan:
    """The plan of the phase whose `stage_memories` these are. All replicas wait for the slowest."""
    phase = stages[0].phase
    times = [StageTime(phase, world_size, stage, gpu) for stage in stages]
    passes = max((_passes(times, own) for own in stages[0].orders), key=lambda each: each.seconds)
    end = max((time.end_seconds() for time in times), key=lambda each: sum(each.values()))
    parts = _busiest(times, passes)
    parts[BUBBLE] = passes.seconds - passes.teachers - sum(parts.values())
    parts |= {"teacher": parts.get("teacher", 0.0) + passes.teachers, **end}
    sent = [_communication(times, own) for own in stages[0].orders]
    return PhasePlan(
        phase,
        world_size,
        gpu,
        [stage.memory() for stage in stages],
        passes.seconds + sum(end.values()),
        {part: seconds for part, seconds in parts.items() if seconds > 0},
        {axis: max(each[axis] for each in sent) for axis in AXES},
        passes.timeline,
        passes.order,
    )


class _Passes(NamedTuple):
    """A replica's forward and backward passes. order: the objectives of its micro-batches. teachers: seconds of the
    teachers' pass before the timeline, which is 0 where they run inside of it."""

    order: Sequence[str]
    timeline: Sequence[Sequence[Timed]]
    teachers: float

    @property
    def seconds(self) -> float:
        return self.teachers + max(stage[-1].end for stage in self.timeline)


def _passes(times: Sequence[StageTime], own: Sequence[str]) -> _Passes:
    p = times[0].phase.recipe.parallel
    timeline = simulate(
        p.pipeline,
        p.virtual_pipeline or 1,
        len(own),
        lambda stage, each: sum(times[stage].chunk_time(each.chunk, own[each.microbatch])[each.backward].values()),
        times[0].message_bytes() / times[0].link("pipeline") if p.pipeline > 1 else 0.0,
    )
    return _Passes(own, timeline, _teacher_seconds(times, own) if p.pipeline > 1 else 0.0)


def _busiest(times: Sequence[StageTime], passes: _Passes) -> dict[str, float]:
    """Seconds by part of the stage that works longest."""
    works = [sum(each.end - each.start for each in stage) for stage in passes.timeline]
    stage = works.index(max(works))
    parts: Counter[str] = Counter()
    for what, _, _ in passes.timeline[stage]:
        parts.update(times[stage].chunk_time(what.chunk, passes.order[what.microbatch])[what.backward])
    return dict(parts)


def _teacher_seconds(times: Sequence[StageTime], own: Sequence[str]) -> float:
    """The forward-only pass before the student's: the slowest stage's work, and the way to it through the others."""
    work = [[sum(time.teacher_seconds(name).values()) for name in own] for time in times]
    slowest = max(sum(stage) for stage in work)
    return slowest + sum(max(stage, default=0.0) for stage in work) - max(max(stage, default=0.0) for stage in work)


def _communication(times: Sequence[StageTime], own: Sequence[str]) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step, by axis."""
    found: list[dict[str, float]] = []
    for time in times:
        sent = dict.fromkeys(AXES, 0.0)
        for name, count in Counter(own).items():
            sent["tensor"] += count * time.tensor_step_bytes(name)
            sent["context"] += count * time.context_step_bytes(name)
            sent["pipeline"] += count * time.pipeline_step_bytes(name)
        sent["tensor"] += time.tensor_gradient_bytes()
        sent["data"] = sum(time.data_bytes().values())
        found.append(sent)
    return {axis: max(sent[axis] for sent in found) for axis in AXES}


def to_json(plans: Sequence[PhasePlan], changes: Sequence[Change] = ()) -> dict[str, Any]:
    """The content of plan.json. Of several phases: the fullest one's, the hours of all, and each one's step."""
    plan = max(plans, key=lambda each: each.needed_bytes)
    recipe, peak = plan.phase.recipe, plan.fullest.peak
    hours = sum(each.hours for each in plans)
    cost = None if plan.gpu.dollars_per_hour is None else hours * plan.world_size * plan.gpu.dollars_per_hour
    ranks = _stage_ranks(plan)
    return {
        "fits": all(each.fits for each in plans),
        "layout": layout(plan),
        "gpu_memory_bytes": plan.gpu.memory_bytes,
        "memory_bytes": _rounded(peak.parts | {"reserved": plan.gpu.reserved_bytes, "total": plan.needed_bytes}),
        "memory_peak": {"pipeline_stage": plan.fullest.stage, "moment": peak.moment},
        "memory_bytes_by_rank": [
            {
                "ranks": ranks[each.stage],
                "pipeline_stage": each.stage,
                "moment": each.peak.moment,
                **_rounded(each.peak.parts),
            }
            for each in plan.memory
        ],
        "step_seconds": plan.step_seconds,
        "step_seconds_by_part": dict(plan.seconds_by_part),
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "model_flops_utilization": plan.model_flops_utilization,
        "communication_bytes_by_axis": _rounded(plan.communication_bytes),
        "steps": recipe.training.steps,
        "hours": hours,
        "dollars": cost,
        "phases": [
            {"number": p.phase.number, "fits": p.fits, "step_seconds": p.step_seconds, "hours": p.hours} for p in plans
        ],
        "from_caches": _from_caches(plans),
        "best_changes": [{"override": each.override, "saves_hours": hours - each.hours} for each in changes],
        "assumptions": plan.gpu.model_dump(mode="json"),
    }


def _from_caches(plans: Sequence[PhasePlan]) -> dict[str, Any] | None:
    """Of a run whose teacher caches have everything; None where it has none."""
    if all(each.from_caches is None for each in plans):
        return None
    full = [each.from_caches or each for each in plans]
    most = max(each.needed_bytes for each in full)
    return {
        "fits": all(each.fits for each in full),
        "memory_bytes": math.ceil(most),
        "hours": sum(each.hours for each in full),
    }


def layout(plan: PhasePlan) -> dict[str, Any]:
    """The ranks of each axis, and what backward recomputes."""
    p = plan.phase.recipe.parallel
    replicas = plan.world_size // (p.tensor * p.pipeline * p.context)
    axes = p.model_dump(
        mode="json", include={"tensor", "pipeline", "virtual_pipeline", "layers_per_chunk", "context", "sequence"}
    )
    return {"world": plan.world_size, **axes, "data": replicas, "recompute": plan.phase.recipe.training.recompute}


def _stage_ranks(plan: PhasePlan) -> list[str]:
    """'0-15' for each stage: Megatron gives a stage consecutive ranks."""
    size = plan.world_size // plan.phase.recipe.parallel.pipeline
    return [f"{stage * size}-{(stage + 1) * size - 1}" for stage in range(plan.phase.recipe.parallel.pipeline)]


def _rounded(values: Mapping[str, float]) -> dict[str, int]:
    return {name: math.ceil(value) for name, value in values.items()}


def verdict(plans: Sequence[PhasePlan], changes: Sequence[Change]) -> list[str]:
    """What one glance should say, a line each."""
    plan = max(plans, key=lambda each: each.needed_bytes)
    content = to_json(plans, changes)
    part, seconds = max(plan.seconds_by_part.items(), key=lambda item: item[1])
    lines = [
        f"{'fits' if content['fits'] else 'does not fit'}: {plan.needed_bytes / GIB:.1f} of "
        f"{plan.gpu.memory_bytes / GIB:.1f} GiB on the fullest rank (stage {plan.fullest.stage}, "
        f"{plan.fullest.peak.moment})",
        f"takes {content['hours']:.1f} hours: {plan.phase.recipe.training.steps:,} steps of {plan.step_seconds:.2f} s, "
        f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, {plan.model_flops_utilization:.0%} of the peak FLOPs",
        f"limited by {part}: {seconds / plan.step_seconds:.0%} of a step",
    ]
    if content["dollars"] is not None:
        lines.append(f"costs {content['dollars']:,.0f} dollars")
    if len(plans) > 1:
        lines += [f"phase {p.phase.number}: {p.hours:.1f} hours, {p.needed_bytes / GIB:.1f} GiB" for p in plans]
    if full := content["from_caches"]:
        lines.append(f"from full teacher caches: {full['hours']:.1f} hours, {full['memory_bytes'] / GIB:.1f} GiB")
    for each in content["best_changes"]:
        saved = each["saves_hours"]
        lines.append(f"faster with {each['override']}: saves {saved:.1f} hours ({saved / content['hours']:.0%})")
    return lines


def report(plans: Sequence[PhasePlan], changes: Sequence[Change] = ()) -> str:
    """The verdict, then the parts."""
    plan = max(plans, key=lambda each: each.needed_bytes)
    parts = sorted(plan.seconds_by_part.items(), key=lambda item: -item[1])
    lines = verdict(plans, changes)
    lines.append("memory of a rank, GiB by stage")
    names = list(dict.fromkeys(name for each in plan.memory for name in each.peak.parts if each.peak.parts[name] > 0))
    for name in names:
        values = "".join(f"{each.peak.parts.get(name, 0) / GIB:8.2f}" for each in plan.memory)
        lines.append(f"  {name:<22}{values}")
    totals = "".join(f"{(each.peak.total + plan.gpu.reserved_bytes) / GIB:8.2f}" for each in plan.memory)
    reserved = "".join(f"{plan.gpu.reserved_bytes / GIB:8.2f}" for _ in plan.memory)
    lines += [f"  {'reserved':<22}{reserved}", f"  {'total':<22}{totals}", "seconds of a step"]
    lines += [f"  {name:<30}{seconds:8.3f}  {seconds / plan.step_seconds:4.0%}" for name, seconds in parts]
    lines.append("GB sent by a rank in a step")
    lines += [f"  {axis:<30}{sent / 1e9:8.2f}" for axis, sent in plan.communication_bytes.items() if sent]
    return "\n".join(lines)
