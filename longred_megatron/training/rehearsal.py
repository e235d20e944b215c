"""A cluster's recipe on a CPU: the same layout, objectives, layers and code path, tiny widths, random texts.

It trains two steps, starts again from their checkpoint for a third, and exports; in phases, one step of each, and those
three of the last. What is wrong with a recipe, a layout or the project on it shows here, and not after a night in the
queue.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from longred_megatron.device import bf16_is_slow
from longred_megatron.errors import UserError
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.planning.summary import phases_summary
from longred_megatron.recipe import Phase, Recipe, check_phases, dump_recipe, load_recipe, read_phases
from longred_megatron.recipe.auto_layers import auto_counts
from longred_megatron.training.metrics import memory
from longred_megatron.training.microbatches import open_data
from longred_megatron.training.run import PhaseRun, train
from longred_megatron.training.small_copy import Sizes, small_copy, without_gpu

MAX_RANKS = 16
RANKS_WITH_TWO_REPLICAS = 8  # at most; larger worlds are rehearsed with one
STEPS, STEPS_AFTER_RESUME = 2, 3
SIZES = Sizes(head_dim=8, shortest_sequence=8)


@dataclass(frozen=True)
class Rehearsal:
    """A small copy of a recipe, and what was changed to make it."""

    recipe: Recipe
    num_ranks: int
    changes: list[str]


def rehearse(recipe: Recipe) -> None:
    """Rehearses `recipe` in a temporary folder and prints what each rank did. Of model.hf (and teacher.hf) only
    config.json is read; data sets are replaced by random tokens.

    Raises:
        UserError: the recipe cannot run in its layout, or a rank failed.
    """
    started = time.perf_counter()
    disable_progress_bar()  # transformers', for models of no size
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = Path(temporary)
        rehearsal = shrink(recipe, folder)
        print("rehearsal on random texts; changed for it:")
        print("".join(f"  {change}\n" for change in rehearsal.changes))
        small = rehearsal.recipe
        phases = read_phases(small)
        print(phases_summary(phases, rehearsal.num_ranks, gpu=False), flush=True)
        path = folder / "recipe.yaml"
        path.write_text(dump_recipe(small), encoding="utf-8")
        try:
            run_ranks(_rank, rehearsal.num_ranks, path, folder)
        except ProcessExitedException as error:
            raise UserError(f"the rehearsal failed: {error}; is there enough memory?") from None
        except ProcessRaisedException as error:
            _, is_users, problems = str(error).partition(f"{UserError.__module__}.{UserError.__qualname__}: ")
            if not is_users:
                raise
            raise UserError(*problems.strip().splitlines()) from None
        model = AutoModelForCausalLM.from_pretrained(small.run.dir / "hf")
        logits = model(torch.zeros(1, 4, dtype=torch.int64)).logits
        if not logits.isfinite().all():
            raise UserError("the exported model's logits are not finite")
        print(_report(folder, rehearsal.num_ranks))
    steps, seconds = phases[-1].steps_before + STEPS, time.perf_counter() - started
    print(
        f"rehearsed in {seconds:.0f} seconds: {steps} steps, a restart from their checkpoint, one more step, and an "
        "export that transformers loads. Not rehearsed: GPU kernels, memory, speed, your texts."
    )


def shrink(recipe: Recipe, folder: Path) -> Rehearsal:
    """Writes a small model, a small teacher and random texts to `folder`, and a recipe that trains them: its
    `small_copy`, on as many ranks as this machine can take."""
    parallel, changes = recipe.parallel, []
    while parallel.tensor * parallel.pipeline * parallel.context > MAX_RANKS:
        name = "tensor" if parallel.tensor > 2 else "context"
        size = getattr(parallel, name)
        if size <= 2:
            raise UserError(
                f"`parallel.pipeline` is {parallel.pipeline}: a rehearsal takes {MAX_RANKS} ranks; try it with a "
                f"smaller one (parallel.pipeline={MAX_RANKS // (parallel.tensor * parallel.context)} --rehearse)"
            )
        parallel = parallel.model_copy(update={name: size // 2})
        changes.append(f"parallel.{name}: {size} -> {size // 2}, to fit on {MAX_RANKS} ranks")
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    replicas = 2 if 2 * ranks <= RANKS_WITH_TWO_REPLICAS else 1
    resized = recipe.model_copy(update={"parallel": parallel})
    phases = read_phases(resized)
    problems = check_phases(phases, ranks * replicas, gpu=True)
    if replicas == 2 and problems:  # the step's micro-batches may suit one replica only
        replicas = 1
        problems = check_phases(phases, ranks, gpu=True)
    if problems:
        raise UserError(*problems)
    changes.append(f"data-parallel replicas: {replicas}; {ranks * replicas} ranks, a process each")
    if auto_counts(recipe):
        changes.append("layers: {auto: N} -> N layers at equal distances; the run chooses them by attention drift")
    values, smaller = small_copy(resized, phases, folder, SIZES)
    changes += smaller + _gpu_changes(phases)
    without_gpu(values)
    if values["precision"]["params"] == "bf16" and bf16_is_slow():
        values["precision"]["params"] = "fp32"
        changes.append("precision.params: bf16 -> fp32, this CPU has no instructions for bf16")
    for change in (values["phases"] or ())[:-1]:
        change["training"] = change.get("training", {}) | {"steps": 1}
    values["training"] |= {"steps": STEPS_AFTER_RESUME, "checkpoint_every_steps": 1, "keep_checkpoints": 1}
    return Rehearsal(Recipe.model_validate(values), ranks * replicas, changes)


def _gpu_changes(phases: Sequence[Phase]) -> list[str]:
    kinds = dict.fromkeys(phase.recipe.precision.fp8 for phase in phases if phase.recipe.precision.fp8)
    changes = [f"precision.fp8: {kind} -> null" for kind in kinds]
    if phases[0].recipe.parallel.tp_comm_overlap:
        changes.append("parallel.tp_comm_overlap: true -> false")
    return [f"{change}, there is no GPU; its settings were checked" for change in changes]


def _rank(join: Callable[[str], None], path: Path, folder: Path) -> None:
    """What each rank runs: both parts of the run; then it writes down what it held."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    num_phases = len(load_recipe(path).phases or ())
    key = f"phases.{num_phases - 1}.training.steps" if num_phases else "training.steps"
    for steps in (STEPS, STEPS_AFTER_RESUME):
        join(f"world-{steps}")
        recipe = load_recipe(path, [f"{key}={steps}"])
        phases, groups = read_phases(recipe), initialize(recipe.parallel, recipe.training.seed)
        run = train(recipe, phases, open_data(phases), groups)
        rank = torch.distributed.get_rank()
        (folder / f"rank-{rank}.json").write_text(json.dumps(_description(run)), encoding="utf-8")
        destroy()


def _description(run: PhaseRun) -> dict[str, str]:
    """This rank's place and part, as a row of the report."""
    groups, phase = run.groups, run.phase
    place = {name: getattr(groups, name).rank() for name in ("tp", "pp", "cp", "dp")}
    ends = [name for name in ("pre_process", "post_process") if any(getattr(chunk, name) for chunk in run.chunks)]
    held = {number for chunk in run.chunks for number in chunk.layer_numbers()}
    compared = {tap.layer for needs in phase.needs.values() for tap in needs.pairs}
    if any(needs.teacher_head for needs in phase.needs.values()):
        compared.add(phase.source.num_layers)
    parts = {"pre_process": "embedding", "post_process": "head"}
    teachers = [_spans(chunk.layer_numbers()) for chunks in run.train_step.teachers.models.values() for chunk in chunks]
    return {
        **{name: str(rank) for name, rank in place.items()},
        "layers": ", ".join([*(_spans(chunk.layer_numbers()) for chunk in run.chunks), *(parts[end] for end in ends)]),
        "teacher layers": ", ".join(teachers) or "none",
        "compares": ", ".join(map(str, sorted(held & compared))) or "none",
        "parameters": f"{sum(p.numel() for chunk in run.chunks for p in chunk.parameters()):,}",
        "peak memory": f"{memory()['memory/peak_resident_bytes'] / 2**20:,.0f} MiB",
    }


def _spans(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"


def _report(folder: Path, num_ranks: int) -> str:
    rows = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]
    table = [["rank", *rows[0]], *([str(rank), *row.values()] for rank, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
