"""A whole run: for each phase build, resume, train step by step, save; then export."""

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.checkpoint import distributed, huggingface
from longred_megatron.checkpoint.of_run import checkpoints
from longred_megatron.device import on_gpu
from longred_megatron.dtypes import DTYPES
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.files import write_text
from longred_megatron.model import userbuffers
from longred_megatron.model.chunk import ModelChunk, build_chunks, padded_vocab_size
from longred_megatron.model.fp8 import forget_models
from longred_megatron.planning.flops import microbatch_flops, step_flops
from longred_megatron.planning.order import last_reach_all, microbatch_order
from longred_megatron.recipe import Phase, Recipe, dump_recipe
from longred_megatron.training import metrics as m
from longred_megatron.training import run_folder
from longred_megatron.training.cached_targets import CachedTargets
from longred_megatron.training.microbatches import MicroBatch, MicroBatchSource, dump
from longred_megatron.training.optimizer import build_optimizer, data_parallel, set_hyperparameters, train_only
from longred_megatron.training.saver import CheckpointSaver
from longred_megatron.training.signals import StopRequest
from longred_megatron.training.step import TrainStep
from longred_megatron.training.teachers import Teachers
from longred_megatron.training.watchdog import Watchdog

LoadWeights = Callable[[Sequence[ModelChunk], Path, Architecture, ProcessGroupCollection], None]


@dataclass
class PhaseRun:
    """What one rank holds of a phase of a run."""

    phase: Phase
    student: Architecture  # of model.hf with the longer window
    data: MicroBatchSource
    groups: ProcessGroupCollection
    chunks: list[ModelChunk]
    optimizer: MegatronOptimizer
    train_step: TrainStep

    @property
    def is_main(self) -> bool:
        return torch.distributed.get_rank() == 0


def extended_architecture(phase: Phase) -> Architecture:
    """The model with the phase's RoPE and window."""
    method, known = phase.recipe.model.rope, phase.rope_source
    window = method.max_position_embeddings(known)
    return replace(phase.source, rope=method.extended(known), max_position_embeddings=window)


def build(
    phase: Phase, data: MicroBatchSource, groups: ProcessGroupCollection, load: LoadWeights = huggingface.load_weights
) -> PhaseRun:
    """Builds student, teachers and optimizer, with their initial weights.

    load: writes the weights of a model's folder into its chunks.
    """
    recipe = phase.recipe
    student = extended_architecture(phase)
    tokens = recipe.step.tokens_per_microbatch // recipe.parallel.context
    userbuffers.allocate(recipe.parallel, recipe.precision.params, tokens, student.hidden_size)
    chunks = build_chunks(student, recipe.parallel, recipe.precision, groups, recipe.training.recompute)
    load(chunks, recipe.model.hf, student, groups)
    train_only(recipe.training.trainable, chunks, student)
    teachers = build_teachers(phase, chunks, groups, load)
    counts = {name: settings.microbatches for name, settings in recipe.objectives.items()}
    reach_all = last_reach_all(microbatch_order(counts, phase.needs), phase.needs, groups.dp.size())
    wrapped = data_parallel(chunks, groups, on_gpu() and reach_all, recipe.parallel.overlap_param_gather)
    optimizer = build_optimizer(recipe.optimizer, recipe.precision, wrapped)
    return PhaseRun(
        phase, student, data, groups, chunks, optimizer, TrainStep(phase, wrapped, teachers, optimizer, groups)
    )


def build_teachers(
    phase: Phase,
    student: Sequence[ModelChunk],
    groups: ProcessGroupCollection,
    load: LoadWeights = huggingface.load_weights,
) -> Teachers:
    """Those of a phase that are needed at once; the others are built when a value is missing in their cache.

    student: its chunks, for objectives whose teacher it is.
    """
    extended = extended_architecture(phase)

    def build_one(hf: Path, layers: bool) -> list[ModelChunk]:
        return build_teacher(phase, hf, extended, groups, load, layers)

    return Teachers(phase, groups, student, build_one, CachedTargets(phase, groups))


def build_teacher(
    phase: Phase,
    hf: Path,
    student: Architecture,
    groups: ProcessGroupCollection,
    load: LoadWeights,
    layers: bool = True,
) -> list[ModelChunk]:
    """A frozen teacher on the student's stages, split over them by its own depth, up to the deepest layer that any
    objective needs of it, with a head where one does.

    It lives outside the student's modules, optimizer and checkpoints. layers: false for its head alone.
    """
    recipe, teacher = phase.recipe, phase.teachers[hf]
    parallel = recipe.parallel.of_teacher(teacher.num_layers)
    # Untied: Megatron would synchronise a tied head with the embedding of the first stage; this one is only read. Both
    # heads are cut alike, so that a tensor rank holds the same entries of both.
    untied, rows = replace(teacher, tied_embeddings=False), padded_vocab_size(student, parallel.tensor)
    chunks = build_chunks(untied, parallel, recipe.precision.of_teacher(), groups, vocab_rows=rows)
    taught = phase.taught_by(hf)
    depth = max(map(phase.teacher_depth, taught)) if layers else 0
    keep_head = any(map(phase.teacher_head, taught))
    for chunk in chunks:
        chunk.truncate(depth, keep_head)
        chunk.eval().requires_grad_(False)
    load(chunks, hf, teacher, groups)
    return chunks


def train(
    whole: Recipe, phases: Sequence[Phase], data: Sequence[MicroBatchSource], groups: ProcessGroupCollection
) -> PhaseRun:
    """Trains phase by phase, from the newest checkpoint in the run folder or from the start, and exports.

    Each phase is built anew and goes on from the checkpoint of the step before. Returns the last one.

    Args:
        whole: the recipe of the run, which the phases' are made from; data: of each phase.

    Raises:
        UserError: a loss or gradient is not finite, or the disk is full.
        SystemExit: 128 + signal number, after a checkpoint, when asked to stop.
    """
    rank, num_ranks, folder = torch.distributed.get_rank(), torch.distributed.get_world_size(), whole.run.dir
    done, run, watchdog = _newest_step(folder), None, None
    with ExitStack() as until_the_end:
        for phase, own_data in zip(phases, data, strict=True):
            if done >= phase.last_step and phase is not phases[-1]:
                continue
            if watchdog:
                watchdog.progress(f"building phase {phase.number}")
            run = None
            gc.collect()  # makes room: the parts of the former phase refer to each other
            forget_models()
            run = build(phase, own_data, groups)
            if watchdog is None:  # not before: the weights may be missing or broken, and then nothing has been written
                if rank == 0:
                    write_text(folder / run_folder.RECIPE, dump_recipe(whole))
                patience_seconds = 60 * whole.training.hang_minutes
                watchdog = Watchdog(folder / run_folder.RANKS, rank, num_ranks, patience_seconds)
                until_the_end.enter_context(watchdog)
            _train_phase(run, whole, phases, done, watchdog)
            done = phase.last_step
        assert run is not None and watchdog is not None  # the last phase is never passed over
        watchdog.progress("the export")
        _export(run, whole, done)
    return run


def _train_phase(run: PhaseRun, whole: Recipe, phases: Sequence[Phase], done: int, watchdog: Watchdog) -> None:
    """Trains the steps of a phase after step `done`, whose checkpoint it loads."""
    folder, phase = whole.run.dir, run.phase
    reduce_losses = m.LossReducer(phase.recipe.objectives, run.groups)
    watchdog.progress("loading the checkpoint")
    if done:
        distributed.load(run_folder.checkpoint_path(folder, done), run.chunks, run.optimizer)
    last, first = phases[-1].last_step, done + 1
    shown = ("loss", *(f"loss/{name}" for name in phase.recipe.objectives))
    writer = m.MetricsWriter(folder, last, first, sys.stdout, shown, len(phases)) if run.is_main else None
    saver = CheckpointSaver(whole, watchdog)
    with StopRequest() as stop, closing(writer) if writer else nullcontext(), saver, closing(run.train_step.teachers):
        for step, microbatches in _prefetched(run, first, phase.last_step):
            watchdog.progress(f"step {step}")
            metrics = {"step": step} | ({"phase": phase.number} if whole.phases else {})
            metrics |= _one_step(run, step, microbatches, reduce_losses)
            saver.after_step()
            if m.first_non_finite(metrics):
                saver.finish()  # the checkpoint on its way is a good one
                raise _not_finite(metrics, shown, folder)
            if writer:
                writer.write(metrics)
            is_last = step == phase.last_step
            if is_last or step % whole.training.checkpoint_every_steps == 0:
                run.train_step.finish()
                saver.save(step, run.chunks, run.student, run.optimizer, is_last)
            if signal := stop.agreed():  # after the save: the next phase would not know of a signal before it
                run.train_step.finish()
                saver.save(step, run.chunks, run.student, run.optimizer, is_last=True)
                raise SystemExit(128 + signal)


def _one_step(run: PhaseRun, step: int, microbatches: list[MicroBatch], reduce_losses: m.LossReducer) -> dict[str, Any]:
    phase, groups = run.phase, run.groups
    recipe, own_step = phase.recipe, step - phase.steps_before
    rate = set_hyperparameters(run.optimizer, recipe.optimizer, own_step, recipe.training.steps)
    if recipe.debug.dump_microbatches and groups.mp.rank() == 0 and groups.cp.rank() == 0:
        dump(microbatches, recipe.debug.dump_microbatches, step=step, replica=groups.dp.rank())
    started = time.perf_counter()
    result = run.train_step(microbatches)
    losses = reduce_losses(microbatches, result.terms)  # waits for the device: the step is over
    seconds = time.perf_counter() - started
    tokens, peak = (
        recipe.num_microbatches * recipe.step.tokens_per_microbatch,
        m.peak_flops(recipe.precision.fp8 is not None),
    )
    return {
        **losses,
        "grad_norm": result.grad_norm,
        "lr": rate,
        "tokens": phase.tokens_before + own_step * tokens,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_utilization": peak and _flops(run) / seconds / peak / torch.distributed.get_world_size(),
        "teacher_seconds": result.teacher_seconds,
        **m.memory(),
    }


def _flops(run: PhaseRun) -> float:
    """Of the last step, without what its teachers need not have been asked."""
    phase, full = run.phase, run.phase.with_full_caches
    found = Counter(run.train_step.teachers.cache.found())
    saved = (n * (microbatch_flops(phase, name) - microbatch_flops(full, name)) for name, n in found.items())
    return step_flops(phase) - sum(saved)


def _prefetched(run: PhaseRun, first: int, last: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches of this replica); those of the next step are read while the current one trains."""
    dp, cache = run.groups.dp, run.train_step.teachers.cache

    def read(step: int) -> list[MicroBatch]:
        return cache.read(run.data.step(step, dp.rank(), dp.size()))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
        pending = reader.submit(read, first) if first <= last else None
        for step in range(first, last + 1):
            assert pending is not None
            microbatches = pending.result()
            if step < last:
                pending = reader.submit(read, step + 1)
            yield step, microbatches


def _not_finite(metrics: dict[str, Any], shown: Sequence[str], folder: Path) -> UserError:
    name = m.first_non_finite(metrics)
    assert name is not None
    what = f"{name} is {metrics[name]}"
    if name == "grad_norm":
        losses = ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)
        what += f" (losses are finite: {losses})"
    saved = checkpoints(folder)
    good = f"the last good checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
    return UserError(
        f"step {metrics['step']}: {what}; nothing of this step is saved, {good}. Lower optimizer.lr, use warm-up, set "
        "precision.fp8=null if it is on, or look at the step's data with debug.dump_microbatches=FOLDER, then start "
        "again"
    )


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 without one. Damaged ones are set aside."""
    is_main = torch.distributed.get_rank() == 0
    for step, path in reversed(checkpoints(folder)):
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


def _export(run: PhaseRun, whole: Recipe, last: int) -> None:
    """Writes the model after step `last` to run.dir/hf, unless it is there. Another one there is kept aside."""
    output = whole.run.dir / run_folder.EXPORT
    checkpoint = distributed.read_description(run_folder.checkpoint_path(whole.run.dir, last))
    record = huggingface.Record(step=last, checkpoint=checkpoint.digest)
    is_there = output.exists()
    there = huggingface.read_record(output) if is_there else None
    torch.distributed.barrier()  # the world: every rank has looked before the first one renames it
    if there == record:
        if run.is_main:
            print(f"all {last} steps are done; the exported model is at {output}")
        return
    if is_there:
        if run.is_main:
            aside = run_folder.set_export_aside(output, there.step if there else None)
            print(f"{output} is not the model after step {last}; it is now {aside}")
        torch.distributed.barrier()  # the world: every rank checks that the name is free
    huggingface.export(
        run.chunks,
        whole.model.hf,
        output,
        run.phase.source,
        run.groups,
        rope=run.student.rope,
        max_position_embeddings=run.student.max_position_embeddings,
        dtype=DTYPES[whole.precision.params],
        recipe_text=dump_recipe(whole),
        record=record,
    )
    if run.is_main:
        print(f"exported the model to {output}")
