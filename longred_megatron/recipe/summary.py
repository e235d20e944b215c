"""The arithmetic printed at start-up: ranks, tokens, step loss, expected memory, and what is not computed."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from longred_megatron.families import Architecture
from longred_megatron.families.weights import Part
from longred_megatron.objectives.base import Needs, Tap
from longred_megatron.precision import ATTENTION_NOTE, GRADIENT_BYTES, Precision
from longred_megatron.recipe.phases import Phase
from longred_megatron.recipe.schema import Recipe

GIB = 2**30


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


@dataclass(frozen=True)
class Memory:
    """Expected bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    teacher_targets: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def phases_summary(phases: Sequence[Phase], world_size: int) -> str:
    """What the run will do: first what all phases share, then the rest of each. `check_phases` has found no problem."""
    blocks = [summary(phase, world_size) for phase in phases]
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
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def summary(phase: Phase, world_size: int) -> list[Block]:
    """What a phase will do, in some ten lines."""
    return [
        *_rank_lines(phase.recipe, world_size),
        *_token_lines(phase.recipe),
        _loss_line(phase),
        *_model_lines(phase.recipe, phase.source),
        _memory_lines(phase, world_size),
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


def expected_memory(phase: Phase, world_size: int) -> Memory:
    """Bytes on the fullest rank: the maximum over stages of each part, so the total is an upper estimate.

    tp, pp, cp, dp: degrees of parallelism. T: tokens of a micro-batch. h: hidden size. b: bytes of a number.

    - parameters = b * N, gradients = 4 * N, optimizer = (12 with bf16, 8 with fp32) * N / (dp * cp), of the last two
      only the trained parts' N; N = (layers / pp * parameters of a layer + embedding or head) / tp
    - teacher = b * N of each teacher, without layers above the deepest compared one and without a head no loss needs
    - teacher targets = b * h * T / cp * compared layers of a stage, summed over the replica's micro-batches; with one
      stage, where a teacher runs just before each micro-batch, of the largest of them
    - activations = b * T / cp * (elements kept of a token) * layers of a stage * micro-batches in flight;
      recompute full keeps h, and one layer's working set on top; selective all but what the MLPs hold, and one MLP's
      on top; none all of it (`_layer_elements`)
    - with sequence parallelism, hidden states count T / cp / tp tokens
    - loss = what the objective whose loss needs most says of it
    """
    recipe, source = phase.recipe, phase.source
    parallel, size = recipe.parallel, recipe.precision.number_bytes
    replicas = _replicas(recipe, world_size)
    parameters = _stage_parameters(recipe, source, source.num_layers, True)
    trained = _stage_parameters(recipe, source, source.num_layers, True, recipe.training.trainable)
    teachers = 0.0
    for hf, teacher in phase.teachers.items():
        depth, head = _teacher_extent(phase.taught_by(hf).values(), teacher)
        teachers += _stage_parameters(recipe, teacher, depth, head)
    return Memory(
        parameters=size * parameters,
        gradients=GRADIENT_BYTES * trained,
        optimizer=recipe.precision.optimizer_bytes * trained / (replicas * parallel.context),
        teacher=size * teachers,
        teacher_targets=_target_elements(phase, replicas) * size,
        activations=_activation_elements(recipe, source, replicas) * size,
        loss=max(o.working_bytes(phase.sites[name]) for name, o in recipe.objectives.items()),
    )


def checkpoint_bytes(phase: Phase, world_size: int) -> float:
    """What the fullest rank writes of a checkpoint: (b * N + 12 * trained N) / (dp * cp).

    12: an fp32 copy of each trained parameter, whatever its own type, and Adam's two moments. See `expected_memory`.
    """
    recipe, source = phase.recipe, phase.source
    parameters = _stage_parameters(recipe, source, source.num_layers, True)
    trained = _stage_parameters(recipe, source, source.num_layers, True, recipe.training.trainable)
    whole = recipe.precision.number_bytes * parameters + 12 * trained
    return whole / (_replicas(recipe, world_size) * recipe.parallel.context)


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


def _memory_lines(phase: Phase, world_size: int) -> Block:
    recipe, memory = phase.recipe, expected_memory(phase, world_size)
    formulas = {
        "parameters": f"{recipe.precision.number_bytes} bytes x N",
        "gradients": f"{GRADIENT_BYTES} bytes x N",
        "optimizer": f"{recipe.precision.optimizer_bytes} bytes x N / (data x context)",
        "teacher": "forward only: no gradients, no optimizer",
        "teacher_targets": "values of the compared layers, kept for the student's pass",
        "activations": f"recompute {recipe.training.recompute}",
        "loss": "a chunk of tokens at a time",
    }
    parts = tuple((n.replace("_", " "), f"{getattr(memory, n) / GIB:.2f} GiB ({why})") for n, why in formulas.items())
    return Block("memory a rank", f"about {memory.total / GIB:.1f} GiB, rough, fullest stage", parts, brief=True)


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
        depth, head = _teacher_extent(phase.taught_by(hf).values(), teacher)
        if depth < teacher.num_layers:
            skipped.append(f"{whose} layers {depth + 1} to {teacher.num_layers}")
        if not head:
            skipped.append(f"{whose} head")
    if without := [name for name, each in needs.items() if not each.student_head]:
        skipped.append(f"the model's head on {', '.join(without)}")
    return Block("not computed", "; ".join(skipped) or "nothing")


def _teacher_extent(needs: Iterable[Needs], teacher: Architecture) -> tuple[int, bool]:
    """The last layer that a teacher has to run for all `needs`, and whether it needs its head."""
    each = list(needs)
    return max(n.teacher_depth(teacher.num_layers) for n in each), any(n.teacher_head for n in each)


def _replicas(recipe: Recipe, world_size: int) -> int:
    return world_size // (recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context)


def _stage_parameters(
    recipe: Recipe,
    architecture: Architecture,
    num_layers: int,
    with_head: bool,
    parts: Collection[Part] | None = None,
) -> float:
    """Parameters of the fullest rank, with the lowest `num_layers` layers spread over the stages as they are.

    parts: only these; None: all.
    """
    if num_layers == 0:
        return 0
    parallel = recipe.parallel
    counts = [sum(number <= num_layers for number in stage) for stage in _stages(recipe, architecture)]
    # With one stage the embedding and an untied head share a rank.
    tables = [parts is None or "embedding" in parts]
    if with_head and not architecture.tied_embeddings:
        tables.append(parts is None or "head" in parts)
    rows = sum(tables) if parallel.pipeline == 1 else max(tables)
    embedding = architecture.vocab_size * architecture.hidden_size
    return (max(counts) * architecture.layer_parameters(parts) + rows * embedding) / parallel.tensor


def _stages(recipe: Recipe, architecture: Architecture) -> list[list[int]]:
    """Layer numbers (from 1) of each pipeline stage."""
    depth, pipeline = architecture.num_layers, recipe.parallel.pipeline
    chunks = recipe.parallel.for_depth(depth).chunk_layers(depth)
    return [[number for chunk in chunks[stage::pipeline] for number in chunk] for stage in range(pipeline)]


def _rank_tokens(recipe: Recipe) -> float:
    """Tokens of a micro-batch whose hidden states one rank keeps."""
    parallel = recipe.parallel
    return recipe.step.tokens_per_microbatch / parallel.context / (parallel.tensor if parallel.sequence else 1)


def _target_elements(phase: Phase, replicas: int) -> float:
    """Teacher values kept between the teacher's pass and the student's, on the fullest stage."""
    recipe = phase.recipe
    stages, largest = [0.0] * recipe.parallel.pipeline, 0.0
    for name, settings in recipe.objectives.items():
        teacher = phase.sites[name].teacher
        where = recipe.parallel.for_depth(teacher.num_layers).layer_stages(teacher.num_layers)
        share = -(-settings.microbatches // replicas)  # shares of replicas differ by one at most
        sizes = {tap: _tap_elements(recipe, tap, teacher) for tap in phase.needs[name].teacher_taps(teacher.num_layers)}
        for tap, size in sizes.items():
            stages[where[tap.layer]] += share * size
        largest = max(largest, sum(sizes.values()))
    return max(stages) if len(stages) > 1 else largest


def _tap_elements(recipe: Recipe, tap: Tap, model: Architecture) -> float:
    """Numbers that one rank keeps of one micro-batch."""
    if tap.what in ("hidden", "attention_output"):
        return _rank_tokens(recipe) * model.hidden_size
    heads = model.num_attention_heads if tap.what == "query" else model.num_kv_heads
    return recipe.step.tokens_per_microbatch / recipe.parallel.context * heads * model.head_dim / recipe.parallel.tensor


def _activation_elements(recipe: Recipe, architecture: Architecture, replicas: int) -> float:
    """Elements kept for the backward pass on the first stage, which has the most micro-batches in flight."""
    parallel = recipe.parallel
    microbatches = recipe.num_microbatches // replicas
    in_flight = float(min(parallel.pipeline, microbatches))
    if parallel.virtual_pipeline is not None:
        in_flight *= 1 + (parallel.pipeline - 1) / (parallel.pipeline * parallel.virtual_pipeline)
    layers = len(_stages(recipe, architecture)[0])
    working_set = _layer_elements(recipe, architecture)
    if recipe.training.recompute == "full":
        return in_flight * layers * _rank_tokens(recipe) * architecture.hidden_size + working_set
    if recipe.training.recompute == "selective":
        tokens = recipe.step.tokens_per_microbatch / parallel.context
        mlp = tokens * architecture.layer_activations().mlp / parallel.tensor
        return in_flight * layers * (working_set - mlp) + mlp
    return in_flight * layers * working_set


def _layer_elements(recipe: Recipe, architecture: Architecture) -> float:
    """What one layer keeps of one micro-batch."""
    kept = architecture.layer_activations()
    tokens = recipe.step.tokens_per_microbatch / recipe.parallel.context
    return _rank_tokens(recipe) * kept.whole + tokens * kept.split / recipe.parallel.tensor
