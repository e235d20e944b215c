"""A whole run: for each phase build, resume, train step by step, save; then export."""

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.checkpoint import distributed, huggingface
from longred_megatron.dtypes import DTYPES
from longred_megatron.errors import UserError
from longred_megatron.files import write_text
from longred_megatron.model.stage import Stage, build_stages, padded_vocab_size
from longred_megatron.recipe import Architecture, Phase, Recipe, dump_recipe, rope_extension
from longred_megatron.rope.scaling import extended_rope
from longred_megatron.training import metrics as m
from longred_megatron.training import run_folder
from longred_megatron.training.flops import step_flops
from longred_megatron.training.microbatches import MicroBatch, MicroBatchSource, dump
from longred_megatron.training.optimizer import build_optimizer, data_parallel, set_hyperparameters
from longred_megatron.training.order import microbatch_order
from longred_megatron.training.signals import StopRequest
from longred_megatron.training.step import TrainStep, compared_layers, every_replica_ends_on_tokens, wants_teacher_head
from longred_megatron.training.watchdog import Watchdog


@dataclass
class Run:
    """What one rank holds of a phase of a run."""

    recipe: Recipe
    source: Architecture  # of model.hf, as released
    student: Architecture  # the same with the longer window
    teacher: Architecture | None
    data: MicroBatchSource
    groups: ProcessGroupCollection
    stages: list[Stage]
    optimizer: MegatronOptimizer
    train_step: TrainStep

    @property
    def is_main(self) -> bool:
        return torch.distributed.get_rank() == 0


def extended_architecture(recipe: Recipe, source: Architecture) -> Architecture:
    """The model with the recipe's RoPE and window."""
    rope = extended_rope(source.rope, **rope_extension(recipe, source))
    return replace(source, rope=rope, max_position_embeddings=recipe.model.max_position_embeddings)


def build(
    recipe: Recipe,
    source: Architecture,
    teacher: Architecture | None,
    data: MicroBatchSource,
    groups: ProcessGroupCollection,
) -> Run:
    """Builds student, teacher (None: no objective needs one) and optimizer, with their initial weights."""
    student = extended_architecture(recipe, source)
    stages = build_stages(student, recipe.parallel, recipe.precision, groups, recipe.training.recompute)
    huggingface.load_weights(stages, recipe.model.hf, student, groups)
    teacher_stages = build_teacher(recipe, teacher, student, groups) if teacher is not None else []

    order = microbatch_order({name: o.microbatches for name, o in recipe.objectives.items()})
    overlap = torch.cuda.is_available() and every_replica_ends_on_tokens(order, groups.dp.size())
    chunks = data_parallel(stages, groups, overlap)
    optimizer = build_optimizer(recipe.optimizer, recipe.precision, chunks)
    step = TrainStep(recipe, chunks, teacher_stages, optimizer, groups)
    return Run(recipe, source, student, teacher, data, groups, stages, optimizer, step)


def build_teacher(
    recipe: Recipe, teacher: Architecture, student: Architecture, groups: ProcessGroupCollection
) -> list[Stage]:
    """The frozen teacher on the student's stages, split over them by its own depth, up to the deepest layer that any
    objective wants, with a head where one needs it.

    It lives outside the student's modules, optimizer and checkpoints.
    """
    parallel = recipe.parallel.for_depth(teacher.num_layers)
    # Untied: Megatron would synchronise a tied head with the embedding of the first stage; this one is only read. Both
    # heads are cut alike, so that a tensor rank holds the same entries of both.
    untied, rows = replace(teacher, tied_embeddings=False), padded_vocab_size(student, parallel.tensor)
    stages = build_stages(untied, parallel, recipe.precision, groups, vocab_rows=rows)
    for stage in stages:
        stage.truncate(teacher_depth(recipe, teacher), keep_head=wants_teacher_head(recipe))
        stage.eval().requires_grad_(False)
    huggingface.load_weights(stages, recipe.teacher.hf, teacher, groups)
    return stages


def teacher_depth(recipe: Recipe, teacher: Architecture) -> int:
    """The deepest layer whose hidden states any objective wants."""
    layers = compared_layers(recipe, teacher.num_layers, teacher.num_layers)
    return max(max(numbers.values()) for numbers in layers.values())


def train(
    recipe: Recipe,
    source: Architecture,
    phases: Sequence[Phase],
    data: Sequence[MicroBatchSource],
    groups: ProcessGroupCollection,
) -> Run:
    """Trains phase by phase, from the newest checkpoint in the run folder or from the start, and exports.

    Each phase is built anew and goes on from the checkpoint of the step before. Returns the last one.

    Raises:
        UserError: a loss or gradient is not finite, or the disk is full.
        SystemExit: 128 + signal number, after a checkpoint, when asked to stop.
    """
    rank, num_ranks, folder = torch.distributed.get_rank(), torch.distributed.get_world_size(), recipe.run.dir
    done, run, watchdog = _newest_step(folder), None, None
    first = done + 1
    with ExitStack() as until_the_end:
        for phase, own_data in zip(phases, data, strict=True):
            if done >= phase.last_step and phase is not phases[-1]:
                continue
            if watchdog:
                watchdog.progress(f"building phase {phase.number}")
            run = None
            gc.collect()  # makes room: the parts of the former phase refer to each other
            run = build(phase.recipe, source, phase.teacher, own_data, groups)
            if watchdog is None:  # not before: the weights may be missing or broken, and then nothing has been written
                if rank == 0:
                    write_text(folder / "recipe.yaml", dump_recipe(recipe))
                patience_seconds = 60 * recipe.training.hang_minutes
                watchdog = Watchdog(folder / run_folder.RANKS, rank, num_ranks, patience_seconds)
                until_the_end.enter_context(watchdog)
            _train_phase(run, recipe, phases, phase, done, watchdog)
            done = phase.last_step
        assert run is not None and watchdog is not None  # the last phase is never passed over
        watchdog.progress("the export")
        _export(run, recipe, first, done)
    return run


def _train_phase(
    run: Run, recipe: Recipe, phases: Sequence[Phase], phase: Phase, done: int, watchdog: Watchdog
) -> None:
    """Trains the steps of `phase` after step `done`, whose checkpoint it loads. `recipe` is the whole run's."""
    folder = recipe.run.dir
    teacher_layers = run.teacher and teacher_depth(run.recipe, run.teacher)
    flops = step_flops(run.recipe, run.student, run.teacher, teacher_layers or 0)
    watchdog.progress("loading the checkpoint")
    if done:
        distributed.load(run_folder.checkpoint_path(folder, done), run.stages, run.optimizer)
    last, first = phases[-1].last_step, done + 1
    writer = m.MetricsWriter(folder, last, first, sys.stdout, len(phases)) if run.is_main else None
    with StopRequest() as stop, closing(writer) if writer else nullcontext():
        for step, microbatches in _prefetched(run, first, phase.last_step):
            watchdog.progress(f"step {step}")
            metrics = {"step": step} | ({"phase": phase.number} if recipe.phases else {})
            metrics |= _one_step(run, phase, step, microbatches, flops)
            _check_finite(metrics, folder)
            if writer:
                writer.write(metrics)
            if step == phase.last_step or step % recipe.training.checkpoint_every_steps == 0:
                _save(run, recipe, step, watchdog)
            if signal := stop.agreed():  # after the save: the next phase would not know of a signal before it
                _save(run, recipe, step, watchdog)
                raise SystemExit(128 + signal)


def _one_step(run: Run, phase: Phase, step: int, microbatches: list[MicroBatch], flops: float) -> dict[str, Any]:
    recipe, groups, own_step = run.recipe, run.groups, step - phase.steps_before
    rate = set_hyperparameters(run.optimizer, recipe.optimizer, own_step, recipe.training.steps)
    if recipe.debug.dump_microbatches and groups.mp.rank() == 0 and groups.cp.rank() == 0:
        dump(microbatches, recipe.debug.dump_microbatches, step=step, replica=groups.dp.rank())
    started = time.perf_counter()
    result = run.train_step(microbatches)
    names = m.loss_names(run.train_step.layers, [name for name, _ in recipe.objectives.items()])
    losses = m.reduce_losses(result.losses, names, recipe, groups)  # waits for the device: the step is over
    seconds = time.perf_counter() - started
    tokens, peak = recipe.num_microbatches * recipe.step.tokens_per_microbatch, m.peak_flops()
    return {
        **losses,
        "grad_norm": result.grad_norm,
        "lr": rate,
        "tokens": phase.tokens_before + own_step * tokens,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_utilization": peak and flops / seconds / peak / torch.distributed.get_world_size(),
        "teacher_seconds": result.teacher_seconds,
        **m.memory(),
    }


def _prefetched(run: Run, first: int, last: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches of this replica); those of the next step are read while the current one trains."""
    dp = run.groups.dp
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
        pending = reader.submit(run.data.step, first, dp.rank(), dp.size()) if first <= last else None
        for step in range(first, last + 1):
            assert pending is not None
            microbatches = pending.result()
            if step < last:
                pending = reader.submit(run.data.step, step + 1, dp.rank(), dp.size())
            yield step, microbatches


def _check_finite(metrics: dict[str, Any], folder: Path) -> None:
    name = m.first_non_finite(metrics)
    if name is None:
        return
    what = f"{name} is {metrics[name]}"
    if name == "grad_norm":
        losses = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("loss/") and "layer_" not in k)
        what += f" (losses are finite: {losses})"
    saved = run_folder.checkpoints(folder)
    good = f"the last good checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
    raise UserError(
        f"step {metrics['step']}: {what}; nothing of this step is saved, {good}. Lower optimizer.lr, use warm-up or "
        "precision.params=fp32, or look at the step's data with debug.dump_microbatches=FOLDER, then start again"
    )


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 without one. Damaged ones are set aside."""
    is_main = torch.distributed.get_rank() == 0
    for step, path in reversed(run_folder.checkpoints(folder)):
        try:
            distributed.check(path)
        except UserError as error:
            if is_main:  # every rank has listed and read them by now
                print(f"warning: {error}; it is now {run_folder.set_aside(path)}, and the one before is used")
            continue
        if is_main:
            print(f"resuming after step {step} from {path}")
        return step
    return 0


def _save(run: Run, recipe: Recipe, step: int, watchdog: Watchdog) -> None:
    watchdog.progress(f"the checkpoint of step {step}")
    path = run_folder.checkpoint_path(run.recipe.run.dir, step)
    if not path.exists():
        description = {
            "architecture": asdict(run.student),
            "source_hf": str(run.recipe.model.hf),
            "dtype": run.recipe.precision.params,
            "step": step,
        }
        files = {"recipe.yaml": dump_recipe(recipe)}
        distributed.save(path, run.stages, description, run.optimizer, files)
    if run.is_main:
        run_folder.prune_checkpoints(run.recipe.run.dir, run.recipe.training.keep_checkpoints)


def _export(run: Run, recipe: Recipe, first: int, last: int) -> None:
    """Writes the model to run.dir/hf. An export of an earlier end of this run, before step `first`, is kept aside."""
    output = run.recipe.run.dir / "hf"
    is_there = output.exists()
    torch.distributed.barrier()  # the world: every rank has looked before the first one renames it
    if is_there:
        if first > last:
            if run.is_main:
                print(f"all {last} steps are done; the exported model is at {output}")
            return
        if run.is_main:
            output.rename(output.with_name(f"hf-step-{first - 1:06}"))
        torch.distributed.barrier()  # the world: every rank checks that the name is free
    huggingface.export(
        run.stages,
        run.recipe.model.hf,
        output,
        run.source,
        run.groups,
        rope=run.student.rope,
        max_position_embeddings=run.student.max_position_embeddings,
        dtype=DTYPES[run.recipe.precision.params],
        recipe_text=dump_recipe(recipe),
    )
    if run.is_main:
        print(f"exported the model to {output}")
