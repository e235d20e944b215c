"""Two steps of the recipe at its real widths, with random weights: memory and time on these machines.

Of models only config.json is read, and texts are random. It is tried where the start-up summary's memory fits the
device, and the floating-point operations fit the doctor's time at the speed of a product that is measured first.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Report
from longred_megatron.dtypes import DTYPES
from longred_megatron.families import Architecture
from longred_megatron.model.chunk import ModelChunk
from longred_megatron.parallel.groups import initialize
from longred_megatron.planning.flops import step_flops
from longred_megatron.planning.gpus import gpu_of_card
from longred_megatron.planning.memory import fullest_rank
from longred_megatron.planning.plan import GIB, plan_phase
from longred_megatron.recipe import Phase, Recipe, dump_recipe, load_recipe, read_phases
from longred_megatron.training.metrics import LossReducer, memory, peak_flops
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.run import build
from longred_megatron.training.small_copy import without_gpu, write_texts

STEPS = 2  # the first one also compiles, allocates and connects
LONGEST_SECONDS = {True: 180.0, False: 60.0}  # of both steps, on a GPU and on a CPU
EFFICIENCY = 0.3  # of a step, in parts of the speed of a large product; less is rare
# The plan leaves out what kernels and the allocator take for a while.
MEMORY_SLACK = 1.25
CPU_OVERHEAD_BYTES = 2**30  # of a rank's libraries, beside the model
BUILD_SECONDS = 120.0
NAME = "real widths"


def check(patient: Patient) -> Iterator[Finding]:
    """The phase that takes most memory."""
    size = patient.team.size
    expected, phase = max(
        ((fullest_rank(each, size, on_gpu()).peak.total, each) for each in patient.phases), key=lambda pair: pair[0]
    )
    machines = patient.team.run(describe, patient.recipe.precision.params, seconds=BUILD_SECONDS)
    if why := _too_large(phase, expected, machines, patient.team.hosts):
        yield not_tried(NAME, why)
        return
    recipe = _on_random_texts(patient, phase)
    seconds = BUILD_SECONDS + 2 * LONGEST_SECONDS[on_gpu()]
    ranks = patient.team.run(train, recipe, phase.number, seconds=seconds)
    yield judge_memory(ranks, expected, patient.team.hosts)
    yield judge_time(ranks, phase, machines[0]["card"])


def describe(report: Report, params: str) -> dict[str, Any]:
    """Memory that this rank's device has free, bytes; its speed at a product in the format of `params`, FLOP/s; and its
    name and whole memory, None on a CPU."""
    device = torch.cuda.current_device() if on_gpu() else torch.device("cpu")
    if on_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.cuda.current_device()
    size = 8192 if on_gpu() else 1024
    a = torch.ones(size, size, dtype=DTYPES[params], device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    free = torch.cuda.mem_get_info()[0] if on_gpu() else _available_bytes()
    card = torch.cuda.get_device_properties(device) if on_gpu() else None
    return {
        "free_bytes": float(free),
        "flops": 2 * size**3 / best,
        "card": card and (card.name, float(card.total_memory)),
    }


def _available_bytes() -> int:
    """Of this machine's memory."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _too_large(phase: Phase, expected: float, machines: Sequence[dict[str, Any]], hosts: Sequence[str]) -> str:
    """Why the recipe is not tried here; empty: it is."""
    for rank, machine in enumerate(machines):
        beside = 1 if on_gpu() else hosts.count(hosts[rank])  # ranks that share the memory
        own = expected if on_gpu() else MEMORY_SLACK * expected + CPU_OVERHEAD_BYTES
        if own * beside > machine["free_bytes"]:
            return (
                f"the start-up summary expects {expected / GIB:.1f} GiB a rank; {hosts[rank]} has "
                f"{machine['free_bytes'] / GIB:.1f} GiB free for {beside} of them"
            )
    speed = sum(machine["flops"] for machine in machines)
    recomputed = 4 / 3 if phase.recipe.training.recompute == "full" else 1
    seconds = STEPS * recomputed * step_flops(phase) / speed / EFFICIENCY
    if seconds > LONGEST_SECONDS[on_gpu()]:
        return (
            f"two steps would take about {seconds / 60:.0f} minutes here ({speed / 1e12:.3g} TFLOP/s measured at a "
            f"product, all ranks); try fewer micro-batches, such as objectives.NAME.microbatches=1"
        )
    return ""


def _on_random_texts(patient: Patient, phase: Phase) -> Path:
    """The recipe with random texts of its own lengths, in this rank's folder."""
    folder = patient.folder / "real"
    folder.mkdir()
    longest = max(settings.sequence_length for settings in phase.recipe.objectives.values())
    models = [phase.source, *phase.teachers.values()]
    write_texts(folder / "texts", 2 * longest, min(each.vocab_size for each in models))
    values = patient.recipe.model_dump(mode="json")
    for change in (values, *(values["phases"] or ())):
        data = change.get("data") or {}
        change |= (
            {"data": {name: blend and {str(folder / "texts"): 1.0} for name, blend in data.items()}} if data else {}
        )
    if not on_gpu():
        without_gpu(values)
    values["debug"]["dump_microbatches"] = None
    values["run"]["dir"] = str(folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    return path


def train(report: Report, path: Path, number: int) -> dict[str, Any]:
    """Trains two steps of a phase; returns its losses, seconds of each step and this rank's largest memory, bytes."""
    before = 0.0 if on_gpu() else memory()["memory/peak_resident_bytes"]
    recipe = load_recipe(path)
    phase = read_phases(recipe)[number - 1]
    groups = initialize(recipe.parallel, recipe.training.seed)
    report("building the models")
    run = build(phase, MicroBatchSource(phase), groups, random_weights)
    reduce_losses, fp8 = LossReducer(phase.recipe.objectives, groups), phase.recipe.precision.fp8 is not None
    seconds: list[float] = []
    losses: dict[str, float] = {}
    for step in range(1, STEPS + 1):
        report(f"step {step}")
        microbatches = run.data.step(step, groups.dp.rank(), groups.dp.size())
        started = time.perf_counter()
        result = run.train_step(microbatches)
        losses = reduce_losses(microbatches, result.terms)  # waits for the device
        seconds.append(time.perf_counter() - started)
    [peak] = memory().values()
    return {"losses": losses, "seconds": seconds, "bytes": peak - before, "peak_flops": peak_flops(fp8)}


def random_weights(
    chunks: Sequence[ModelChunk], hf: Path, architecture: Architecture, groups: ProcessGroupCollection
) -> None:
    """In place of those of a folder: of the size that models start with, norms at one and biases at zero."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.02)
            else:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)


def judge_memory(ranks: Sequence[dict[str, Any]], expected: float, hosts: Sequence[str]) -> Finding:
    """The fullest rank against the start-up summary; and whether the losses are numbers."""
    rank = max(range(len(ranks)), key=lambda i: ranks[i]["bytes"])
    used = ranks[rank]["bytes"]
    numbers = {"bytes": [each["bytes"] for each in ranks], "expected_bytes": expected, "losses": ranks[0]["losses"]}
    text = (
        f"{used / GIB:.2f} GiB on rank {rank} on {hosts[rank]}; the start-up summary expects {expected / GIB:.2f} GiB"
    )
    if not all(math.isfinite(loss) for loss in ranks[0]["losses"].values()):
        change = "random weights of a usual size should train: report it with results.json"
        return Finding(f"{NAME}: memory", "wrong", f"a loss is not finite: {ranks[0]['losses']}", change, numbers)
    if used > MEMORY_SLACK * expected and on_gpu():
        change = "leave that much more room than the summary says: training.recompute=full, or a larger parallel.tensor"
        return Finding(f"{NAME}: memory", "wrong", text, change, numbers)
    note = "" if on_gpu() else " (not judged on a CPU: its attention computes in fp32, and libraries count too)"
    return Finding(f"{NAME}: memory", "ok", text + note, numbers=numbers)


def judge_time(ranks: Sequence[dict[str, Any]], phase: Phase, card: tuple[str, float] | None) -> Finding:
    """Of the second step, beside what the planner says of this card (its name and memory); None: on a CPU."""
    size = len(ranks)
    seconds = max(each["seconds"][-1] for each in ranks)
    tokens = phase.recipe.num_microbatches * phase.recipe.step.tokens_per_microbatch
    flops, peak = step_flops(phase) / seconds, ranks[0]["peak_flops"]
    numbers = {
        "step_seconds": [each["seconds"] for each in ranks],
        "tokens_per_second": tokens / seconds,
        "flops": flops,
    }
    share = f", {flops / size / peak:.1%} of the GPUs' peak" if peak else ""
    text = f"{seconds:.1f} s a step, {tokens / seconds:,.0f} tokens/s, {flops / size / 1e12:.3g} TFLOP/s a rank{share}"
    gpu = gpu_of_card(*card) if card else None
    if gpu:
        planned = plan_phase(phase, size, gpu).step_seconds
        numbers["planned_step_seconds"] = planned
        text += f"; tools/plan.py expects {planned:.1f} s"
    elif card:
        text += f"; no plan for {card[0]}: planning/gpus.yaml does not have it"
    return Finding(f"{NAME}: time", "ok", text, numbers=numbers)
