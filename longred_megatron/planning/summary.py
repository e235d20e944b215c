"""A plan's short form, printed at start-up: ranks, tokens, step loss, memory, and what is not computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.families import Architecture
from longred_megatron.planning.cache_size import cache_lines
from longred_megatron.planning.memory import fullest_rank
from longred_megatron.planning.plan import GIB
from longred_megatron.planning.saving import checkpoint_bytes
from longred_megatron.precision import ATTENTION_NOTE, GRADIENT_BYTES, Precision
from longred_megatron.recipe import Phase, Recipe


@dataclass(frozen=True)
class Block:
    """A line of the summary, and those that belong to it. `brief`: its parts are left out where phases are listed."""

    label: str
    text: str
    parts: tuple[tuple[str, str], ...] = ()
    brief: bool = False

    def lines(self, brief: bool = False) -> list[tuple[str, str]]:
        """(label, text) of the line and its parts."""
        parts = () if self.brief and brief else self.parts
        return [(self.label, self.text), *((f"  {label}", text) for label, text in parts)]


def phases_summary(phases: Sequence[Phase], world_size: int, gpu: bool) -> str:
    """What the run will do: first what all phases share, then the rest of each. `check_phases` has found no problem.

    gpu: whether its ranks compute on GPUs.
    """
    blocks = [summary(phase, world_size, gpu) for phase in phases]
    shared = [block for block in blocks[0] if all(block in own for own in blocks)]
    lines = [line for block in shared for line in block.lines()]
    if len(phases) > 1:
        for phase, own in zip(phases, blocks, strict=True):
            optimizer = phase.recipe.optimizer
            steps = f"steps {phase.steps_before + 1:,} to {phase.last_step:,}"
            lines.append((f"phase {phase.number}", f"{steps}, lr {optimizer.lr:g} {optimizer.schedule}"))
            different = (block for block in own if block not in shared)
            lines += [(f"  {label}", text) for block in different for label, text in block.lines(brief=True)]
        lines.append(("tokens in all phases", f"{phases[-1].last_token:,} in {phases[-1].last_step:,} steps"))
    lines += [("teacher cache", line) for line in cache_lines(phases)]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def summary(phase: Phase, world_size: int, gpu: bool) -> list[Block]:
    """What a phase will do, in some ten lines."""
    return [
        *_rank_lines(phase.recipe, world_size),
        *_token_lines(phase.recipe),
        _loss_line(phase),
        *_model_lines(phase.recipe, phase.source),
        _memory_lines(phase, world_size, gpu),
        *_copy_line(phase, world_size),
        _skipped_line(phase),
        *_precision_lines(phase.recipe.precision),
    ]


def _precision_lines(precision: Precision) -> list[Block]:
    """What is computed in FP8."""
    if precision.fp8 is None:
        return []
    of = "student and teachers" if precision.teacher_fp8 else f"student; teachers in {precision.params}"
    parts = (("attention", ATTENTION_NOTE),) if precision.fp8_attention else ()
    return [Block("FP8", f"{precision.fp8}, {precision.scaling} scaling: {of}", parts)]


def _rank_lines(recipe: Recipe, world_size: int) -> list[Block]:
    parallel, replicas = recipe.parallel, _replicas(recipe, world_size)
    chunks = f", {parallel.virtual_pipeline} chunks a stage" if parallel.virtual_pipeline else ""
    tokens = recipe.step.tokens_per_microbatch
    return [
        Block(
            "world",
            f"{world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} x data {replicas}{chunks}",
        ),
        Block(
            "micro-batches",
            f"{recipe.num_microbatches} a step = {recipe.num_microbatches // replicas} on each of "
            f"{replicas} replicas; {tokens:,} tokens each, {tokens // parallel.context:,} on a rank",
        ),
    ]


def _token_lines(recipe: Recipe) -> list[Block]:
    tokens, steps = recipe.step.tokens_per_microbatch, recipe.training.steps
    total = tokens * recipe.num_microbatches
    parts = []
    for name, settings in recipe.objectives.items():
        count = settings.microbatches * tokens
        sequences = count // settings.sequence_length
        parts.append((name, f"{count:,} ({count / total:.1%}): {sequences:,} x {settings.sequence_length:,}"))
    return [
        Block("tokens a step", f"{total:,}", tuple(parts)),
        Block("tokens in all", f"{total * steps:,} = {steps:,} steps x {total:,}"),
    ]


def _loss_line(phase: Phase) -> Block:
    """weight * micro-batches / M of each objective; M = micro-batches of the step."""
    terms, total = [], phase.recipe.num_microbatches
    for name, settings in phase.recipe.objectives.items():
        layers = {tap.layer for tap in phase.needs[name].pairs}
        of = f" ({len(layers)} layers)" if len(layers) > 1 else ""
        terms.append(f"{settings.weight * settings.microbatches / total:.4g} {name}{of}")
    return Block("step loss", " + ".join(terms) + f"   (weight x micro-batches / {total})")


def _model_lines(recipe: Recipe, architecture: Architecture) -> list[Block]:
    settings = recipe.model.rope.model_dump(exclude={"method"}, exclude_none=True)
    shown = {k: f"of {len(v)} numbers" if isinstance(v, tuple) else f"{v:g}" for k, v in settings.items()}
    details = "".join(f", {name} {value}" for name, value in shown.items())
    return [
        Block("parameters", f"{architecture.num_parameters():,}"),
        Block(
            "window",
            f"{architecture.max_position_embeddings:,} -> {recipe.model.max_position_embeddings:,} tokens, "
            f"rope {recipe.model.rope.method}{details}",
        ),
    ]


def _memory_lines(phase: Phase, world_size: int, gpu: bool) -> Block:
    recipe, fullest = phase.recipe, fullest_rank(phase, world_size, gpu)
    peak = fullest.peak
    made_of = {
        "weights": f"{recipe.precision.number_bytes} bytes x N",
        "gradients": f"{GRADIENT_BYTES} bytes x trained N",
        "optimizer": f"{recipe.precision.optimizer_bytes} bytes x trained N / (data x context)",
        "teacher": "forward only: no gradients, no optimizer",
        "targets": "the teacher's values, kept for the student's pass",
        "activations": f"recompute {recipe.training.recompute}; with the losses' chunks",
        "inputs": "token ids, labels and positions of the step",
        "buffers": "of messages between ranks",
        "optimizer temporaries": "while the optimizer steps",
        "fp8 weights": "Transformer Engine's copies, for all micro-batches of a step",
        "gathered parameter": "the largest, of all tensor ranks",
    }
    parts = tuple((part, f"{size / GIB:.2f} GiB ({made_of[part]})") for part, size in peak.parts.items() if size)
    where = f"stage {fullest.stage}, {peak.moment}" if recipe.parallel.pipeline > 1 else peak.moment
    beside = "the GPU's libraries" if gpu else "a process and its libraries, 1 GiB or so"
    return Block(
        "memory a rank", f"{peak.total / GIB:.2f} GiB at the fullest, {where}; beside it {beside}", parts, brief=True
    )


def _copy_line(phase: Phase, world_size: int) -> list[Block]:
    """What asynchronous saving costs."""
    if not phase.recipe.training.async_save:
        return []
    size = checkpoint_bytes(phase, world_size) / GIB
    where = "of the machine's memory, not the GPU's, until it is written"
    return [Block("checkpoint copy", f"about {size:.2f} GiB a rank {where} (training.async_save)")]


def _skipped_line(phase: Phase) -> Block:
    """What no loss uses, and so is not computed."""
    needs, skipped = phase.needs, []
    if not phase.teachers:
        skipped.append("the teacher (no objective compares with it)")
    elif without := [name for name in needs if phase.teacher_of(name) is None]:
        skipped.append(f"the teacher on {', '.join(without)}")
    for hf, teacher in phase.teachers.items():
        whose = "the teacher's" if len(phase.teachers) == 1 else f"teacher {hf}'s"
        taught = phase.taught_by(hf)
        depth, head = max(map(phase.teacher_depth, taught)), any(map(phase.teacher_head, taught))
        if depth < teacher.num_layers:
            skipped.append(f"{whose} layers {depth + 1} to {teacher.num_layers}")
        if not head:
            skipped.append(f"{whose} head")
    if without := [name for name, each in needs.items() if not each.student_head]:
        skipped.append(f"the model's head on {', '.join(without)}")
    return Block("not computed", "; ".join(skipped) or "nothing")


def _replicas(recipe: Recipe, world_size: int) -> int:
    return world_size // (recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context)
