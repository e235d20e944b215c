"""The recipe's layout at tiny widths against one rank, and one rank against plain transformers on the same device.

Compared are the losses of two steps and the gradient of every tensor in the first.

What may differ. On the CPU, in fp32: 1e-5, relative; sums are taken in another order, which makes 1e-6 in 32 layers. On
a GPU, what rounding does to the very same computation is measured: transformers in bf16 against transformers in fp32 is
the control, and the engine may be four times as far from fp32, since it rounds at other places (fp32 products too may
be rounded on a GPU: TF32). A fault, such as a lost reduction, a wrong position or a wrong mask, moves a loss or a
gradient by far more. FP8 keeps 2 or 3 bits of a number where bf16 keeps 7, so that 32 times as much is allowed; faults
are looked for in bf16 first.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longred_megatron.checkpoint import huggingface
from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.plain import plain_step
from longred_megatron.doctor.team import Report
from longred_megatron.layout import Parallel
from longred_megatron.model.fp8 import forget_models
from longred_megatron.parallel.groups import initialize
from longred_megatron.recipe import Phase, load_recipe, read_phases
from longred_megatron.training.metrics import LossReducer
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.optimizer import set_hyperparameters
from longred_megatron.training.run import PhaseRun, build

FP32_ON_CPU = 1e-5
ROUNDING, FP8_ROUNDING = 4.0, 4.0 * 2**5  # times the control
GRADIENT = "gradient of "
SECONDS = 180.0

Numbers = dict[str, float]


def check(patient: Patient) -> Iterator[Finding]:
    """Losses and gradients, in each number format of the recipe that this machine has."""
    layout = patient.recipe.parallel
    named = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
    for name, small in patient.small.items():
        if patient.team.size > 1:
            patient.team.run(in_the_layout, small, patient.folder / name, seconds=SECONDS)
        [found] = patient.team.run(
            on_one_rank, small, patient.folder / name, patient.team.size > 1, seconds=SECONDS, alone=True
        )
        yield judge(f"one rank against transformers, {name}", found["one"], found["limits"], ONE_RANK)
        if patient.team.size > 1:
            subject = f"{patient.team.size} ranks ({named}) against one rank, {name}"
            yield judge(subject, found["layout"], found["limits"], LAYOUT)
        else:
            yield not_tried("the layout against one rank", "there is one rank")
    for name, why in patient.untried_formats().items():
        yield not_tried(f"losses and gradients in {name}", why)


ONE_RANK = (
    "kernels or weights differ from transformers' on this device: compare the versions with constraints.txt, try "
    "LONGRED_DEVICE=cpu; if that is fine, report it with results.json"
)
LAYOUT = (
    "the ranks do not compute what one rank does: set parallel.tensor, pipeline, context, sequence to 1 / false one "
    "after the other to find the axis, and report it with results.json"
)


def in_the_layout(report: Report, small: Path, output: Path) -> None:
    """Rank 0 writes what the ranks compute, a file a phase."""
    recipe = load_recipe(small)
    groups = initialize(recipe.parallel, recipe.training.seed)
    for phase in read_phases(recipe):
        report(f"phase {phase.number} in the layout")
        forget_models()
        losses, gradients = two_steps(build(phase, MicroBatchSource(phase), groups))
        if torch.distributed.get_rank() == 0:
            output.mkdir(exist_ok=True)
            tensors = {GRADIENT + name: tensor for name, tensor in gradients.items()}
            numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
            save_file(tensors | numbers, _file(output, phase))


def on_one_rank(report: Report, small: Path, layout: Path, compare: bool) -> dict[str, Any]:
    """One rank against transformers; and what `in_the_layout` wrote against one rank.

    Returns:
        one, layout: the relative differences by name. limits: what each may be.
    """
    recipe = load_recipe(small)
    alone = recipe.model_copy(update={"parallel": Parallel()})
    groups = initialize(Parallel(), recipe.training.seed, alone=True)
    found: dict[str, Any] = {"one": {}, "layout": {}, "limits": {}}
    for phase in read_phases(alone):
        report(f"phase {phase.number} on one rank")
        forget_models()
        run = build(phase, MicroBatchSource(phase), groups)
        microbatches = run.data.step(1, 0, 1)
        losses, gradients = two_steps(run)
        report(f"phase {phase.number} in transformers")
        # fp64 would be the better reference for fp32, but 1e-5 does not ask for it.
        expected = plain_step(phase, run.student, microbatches, groups, torch.float32)
        control: Numbers = {}
        if on_gpu():
            rounded = plain_step(phase, run.student, microbatches, groups, torch.bfloat16)
            control = differences(rounded, expected)
        prefix = f"phase {phase.number}: " if len(alone.phases or ()) else ""
        own = differences((losses, gradients), expected)
        found["one"] |= {prefix + name: value for name, value in own.items()}
        names = [*own, *(name for name in losses if name not in own)]
        limits = _limits(names, control, phase)
        found["limits"] |= {prefix + name: value for name, value in limits.items()}
        if compare:
            theirs = load_file(_file(layout, phase))
            values = {n: float(t) for n, t in theirs.items() if not n.startswith(GRADIENT)}
            tensors = {n.removeprefix(GRADIENT): t for n, t in theirs.items() if n.startswith(GRADIENT)}
            other = differences((values, tensors), (losses, gradients))
            found["layout"] |= {prefix + name: value for name, value in other.items()}
    return found


def two_steps(run: PhaseRun) -> tuple[Numbers, dict[str, Tensor]]:
    """The losses of the first two steps of a phase and, on rank 0, the first's gradients by Hugging Face name.

    The second step's are `step 2: loss/...`: they show whether every rank got every updated weight.
    """
    phase, groups = run.phase, run.groups
    reduce_losses = LossReducer(phase.recipe.objectives, groups)
    numbers: Numbers = {}
    gradients: dict[str, Tensor] = {}
    for step in (1, 2):
        set_hyperparameters(run.optimizer, phase.recipe.optimizer, step, phase.recipe.training.steps)
        microbatches = run.data.step(step, groups.dp.rank(), groups.dp.size())
        terms, _ = run.train_step.forward_backward(microbatches)
        losses = reduce_losses(microbatches, terms)
        prefix = "" if step == 1 else f"step {step}: "
        numbers |= {prefix + n: v for n, v in losses.items() if n.removeprefix("loss/") in phase.recipe.objectives}
        if step == 1:
            gradients = whole_gradients(run)
            numbers["grad_norm"] = float(run.optimizer.step()[1])
    return numbers, gradients


def whole_gradients(run: PhaseRun) -> dict[str, Tensor]:
    """The reduced gradient of every trained tensor of the step that just ran, on rank 0; others get nothing."""
    groups = run.groups
    for wrapped in run.train_step.student:
        for buffer in wrapped.buffers:
            for bucket in buffer.buckets:
                # The data- and context-parallel ranks: after the reduction each holds the sum of its own piece alone.
                size, rank = groups.dp_cp.size(), groups.dp_cp.rank()
                piece = bucket.grad_data.view(size, -1)[rank].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, piece, group=groups.dp_cp)
    parameters = [p for chunk in run.chunks for p in chunk.parameters()]
    kept = [p.data for p in parameters]
    for parameter in parameters:  # each gradient takes its parameter's place, and the exporter names it
        parameter.data = parameter.main_grad.float() if parameter.requires_grad else torch.zeros_like(parameter)
    named = {
        n: t.clone() for part in huggingface.full_tensors(run.chunks, run.student, groups) for n, t in part.items()
    }
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    if groups.dp.rank() or groups.cp.rank():
        named = {}  # the same as those of the first replica
    is_main, num_ranks = torch.distributed.get_rank() == 0, torch.distributed.get_world_size()
    parts: list[dict[str, Tensor]] | None = [{} for _ in range(num_ranks)] if is_main else None
    torch.distributed.gather_object(named, parts)  # the world: stages hold different layers
    return {name: tensor for part in parts or () for name, tensor in part.items() if tensor.any()}


def differences(ours: tuple[Numbers, Mapping[str, Tensor]], expected: tuple[Numbers, Mapping[str, Tensor]]) -> Numbers:
    """|a - b| / |b| of every number that both have, and of every tensor that either has, by its norm."""
    (numbers, tensors), (their_numbers, their_tensors) = ours, expected
    found = {
        n: abs(numbers[n] - b) / abs(b) if b else abs(numbers[n]) for n, b in their_numbers.items() if n in numbers
    }
    for name in tensors:
        a, b = tensors[name].double().cpu(), their_tensors.get(name)
        found[GRADIENT + name] = float((a - b.double().cpu()).norm() / b.double().norm()) if b is not None else 1.0
    return found


def _limits(names: list[str], control: Numbers, phase: Phase) -> Numbers:
    """What each difference may be, see the module."""
    if not control:
        return dict.fromkeys(names, FP32_ON_CPU)
    factor = FP8_ROUNDING if phase.recipe.precision.fp8 else ROUNDING
    usual = {
        is_gradient: statistics.median(v for n, v in control.items() if n.startswith(GRADIENT) == is_gradient)
        for is_gradient in (False, True)
    }
    # A number of a few terms may by chance be rounded to nearly what it is: then what is usual counts.
    return {n: factor * max(control.get(n, 0.0), usual[n.startswith(GRADIENT)]) for n in names}


def judge(name: str, found: Numbers, limits: Numbers, change: str) -> Finding:
    """Which differences are larger than they may be, and the one that comes nearest to its limit."""
    worse = {n: value / limits[n] for n, value in found.items()}
    above = {n: excess for n, excess in worse.items() if not excess <= 1}  # NaN too
    worst = max(worse, key=lambda n: worse[n] if worse[n] == worse[n] else float("inf"))
    numbers = {"worst": worst, "difference": found[worst], "limit": limits[worst], "differences": found}
    detail = f"{worst} differs by {found[worst]:.1e}, limit {limits[worst]:.1e}"
    if above:
        return Finding(
            name, "wrong", f"{len(above)} of {len(found)} losses and gradients differ; {detail}", change, numbers
        )
    return Finding(name, "ok", f"{len(found)} losses and gradients agree; {detail}", numbers=numbers)


def _file(folder: Path, phase: Phase) -> Path:
    return folder / f"phase-{phase.number}.safetensors"
