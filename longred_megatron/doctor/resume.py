"""Six steps against three, a checkpoint, killed processes, and three more steps by new ones.

The checkpoint lies on the disk of run.dir. Directly after it is loaded, every number of this rank's weights and of its
part of the optimizer (fp32 weights, Adam's two moments) must be the same bit for bit on any device: nothing computes
there. The three steps after it must end at the same bits on the CPU. On a GPU kernels may add in another order each
time: there the control is the same three steps from the same checkpoint once more, and the resumed run may differ from
the one that went on by four times as much; at least by 2^-8 of what three steps change, a rounding of bf16.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longred_megatron.checkpoint import distributed
from longred_megatron.checkpoint.optimizer_state import held_state
from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Report
from longred_megatron.parallel.groups import initialize
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training.metrics import LossReducer
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.optimizer import set_hyperparameters
from longred_megatron.training.run import PhaseRun, build
from longred_megatron.training.step import TrainStep

BEFORE, AFTER = range(1, 4), range(4, 7)  # steps
FLOOR, CONTROL_FACTOR = 2.0**-8, 4.0
SECONDS = 120.0
CHANGE = (
    "a run that is stopped here would not go on as it was: do not rely on checkpoints of this machine; try another "
    "disk for run.dir, compare the versions with constraints.txt, and report it with results.json"
)


def check(patient: Patient) -> Iterator[Finding]:
    """In each number format that this machine has."""
    for name, small in patient.small.items():
        checkpoint, own = patient.shared / f"step-{name}", patient.folder / f"resume-{name}"
        own.mkdir()
        straight = patient.team.run(six_steps, small, checkpoint, own, seconds=SECONDS)
        resumed = patient.team.run(three_more, small, checkpoint, own, seconds=SECONDS)
        yield judge_state(straight, resumed, name, patient.team.hosts)
        yield judge_steps(straight, resumed, name, patient.team.hosts)
    for name, why in patient.untried_formats().items():
        yield not_tried(f"resume in {name}", why)


def six_steps(report: Report, small: Path, checkpoint: Path, own: Path) -> dict[str, Any]:
    """Trains, saves after the third step, trains on. Writes this rank's state after the last step to `own`.

    Returns:
        state: a digest of every tensor at the time of the checkpoint. losses: of the last three steps.
    """
    run = _new_run(small)
    report("steps 1 to 3")
    _train(run, BEFORE)
    report("saving the checkpoint")
    state = _state(run)
    description = {
        "architecture": asdict(run.student),
        "source_hf": str(run.phase.recipe.model.hf),
        "dtype": run.phase.recipe.precision.params,
    }
    distributed.save(checkpoint, run.chunks, description, run.optimizer)
    report("steps 4 to 6")
    save_file({name: tensor.clone() for name, tensor in state.items()}, own / "before.safetensors")
    digests = {name: _digest(tensor) for name, tensor in state.items()}
    losses = _train(run, AFTER)
    save_file({name: tensor.clone() for name, tensor in _state(run).items()}, own / "after.safetensors")
    return {"state": digests, "losses": losses}


def three_more(report: Report, small: Path, checkpoint: Path, own: Path) -> dict[str, Any]:
    """Loads the checkpoint and trains the last three steps; twice on a GPU.

    Returns:
        As `six_steps`; and difference: the largest of a tensor from that of the run that went on, in parts of what the
        three steps changed of it; control: the same of the two times; worst: the tensor.
    """
    run = _new_run(small)
    report("loading the checkpoint")
    distributed.check(checkpoint)
    distributed.load(checkpoint, run.chunks, run.optimizer)
    digests = {name: _digest(tensor) for name, tensor in _state(run).items()}
    report("steps 4 to 6, resumed")
    losses = _train(run, AFTER)
    state = {name: tensor.clone() for name, tensor in _state(run).items()}
    before, after = load_file(own / "before.safetensors"), load_file(own / "after.safetensors")
    difference, worst = _difference(state, after, before)
    control = 0.0
    if on_gpu():
        report("steps 4 to 6, resumed once more")
        distributed.load(checkpoint, run.chunks, run.optimizer)
        _train(run, AFTER)
        control, _ = _difference(_state(run), state, before)
    return {"state": digests, "losses": losses, "difference": difference, "worst": worst, "control": control}


def _new_run(small: Path) -> PhaseRun:
    recipe = load_recipe(small)
    groups, phase = initialize(recipe.parallel, recipe.training.seed), read_phases(recipe)[0]
    return build(phase, MicroBatchSource(phase), groups)


def _train(run: PhaseRun, steps: Sequence[int]) -> list[dict[str, float]]:
    recipe, groups = run.phase.recipe, run.groups
    reduce_losses, losses = LossReducer(recipe.objectives, groups), []
    step_once: TrainStep = run.train_step
    for step in steps:
        set_hyperparameters(run.optimizer, recipe.optimizer, step, recipe.training.steps)
        microbatches = run.data.step(step, groups.dp.rank(), groups.dp.size())
        result = step_once(microbatches)
        losses.append(reduce_losses(microbatches, result.terms) | {"grad_norm": result.grad_norm})
    step_once.finish()
    return losses


def _state(run: PhaseRun) -> dict[str, Tensor]:
    """This rank's weights, and what its optimizer holds of them, by name; on the CPU."""
    weights = {
        f"weight {i} {name}": p.data for i, chunk in enumerate(run.chunks) for name, p in chunk.named_parameters()
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in (weights | held_state(run.optimizer)).items()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _difference(a: dict[str, Tensor], b: dict[str, Tensor], before: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |a - b| / |b - before| of any tensor, by norm, and its name."""
    found = {}
    for name in b:
        change, own = (b[name].double() - before[name].double()).norm(), (a[name].double() - b[name].double()).norm()
        found[name] = float(own / change) if change else float(own)
    worst = max(found, key=lambda name: found[name])
    return found[worst], worst


def judge_state(
    straight: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]], name: str, hosts: Sequence[str]
) -> Finding:
    """Whether what was loaded is what was saved, on every rank."""
    title = f"loaded state, {name}"
    for rank, (saved, loaded) in enumerate(zip(straight, resumed, strict=True)):
        other = [key for key, digest in saved["state"].items() if loaded["state"].get(key) != digest]
        if other:
            text = (
                f"{len(other)} of {len(saved['state'])} tensors are not what was saved, on rank {rank} on "
                f"{hosts[rank]}: {', '.join(_kinds(other))}; the first is {other[0]}"
            )
            return Finding(title, "wrong", text, CHANGE, {"rank": rank, "tensors": other})
    count = sum(len(saved["state"]) for saved in straight)
    kinds = ", ".join(_kinds(straight[0]["state"]))
    return Finding(title, "ok", f"{count} tensors of all ranks ({kinds}) are what was saved, bit for bit")


def _kinds(names: Sequence[str] | dict[str, str]) -> list[str]:
    """weight, param, exp_avg, exp_avg_sq: the first word of each name."""
    return list(dict.fromkeys(name.split()[0] for name in names))


def judge_steps(
    straight: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]], name: str, hosts: Sequence[str]
) -> Finding:
    """Whether the resumed run went where the one that was not stopped did."""
    control = max(each["control"] for each in resumed)
    limit = max(FLOOR, CONTROL_FACTOR * control) if on_gpu() else 0.0
    rank = max(range(len(resumed)), key=lambda i: resumed[i]["difference"])
    worst = resumed[rank]
    numbers = {
        "difference": worst["difference"],
        "limit": limit,
        "control": control,
        "losses": straight[0]["losses"],
        "losses_resumed": resumed[0]["losses"],
    }
    losses = straight[0]["losses"] == resumed[0]["losses"]
    title = f"3 + 3 steps against 6, {name}"
    if not worst["difference"] <= limit or (not on_gpu() and not losses):
        text = (
            f"{worst['worst']} differs by {worst['difference']:.1e} of what three steps change, limit {limit:.1e}, on "
            f"rank {rank} on {hosts[rank]}; the losses are {'the same' if losses else 'others'}"
        )
        return Finding(title, "wrong", text, CHANGE, numbers)
    how = (
        "to the last bit"
        if worst["difference"] == 0 and losses
        else f"up to {worst['difference']:.1e}, limit {limit:.1e}"
    )
    return Finding(
        title, "ok", f"losses, weights and Adam's moments agree {how}, by killed and new processes", numbers=numbers
    )
