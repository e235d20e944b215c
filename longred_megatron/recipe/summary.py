"""The arithmetic printed at start-up: ranks, tokens, step loss, expected memory, and what is not computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.families import Architecture
from longred_megatron.recipe.schema import Recipe, ShortRestoration

GIB = 2**30
# Gradients are summed over micro-batches in fp32, whatever the parameters' type.
GRADIENT_BYTES = 4
# Adam: two fp32 moments; with bf16 parameters an fp32 copy of them as well.
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}
PARAMETER_BYTES = {"bf16": 2, "fp32": 4}
# Rows of logits that the chunked cross-entropy holds at a time, as fp32 logits and their gradient.
LOSS_CHUNK_TOKENS = 1024
LOSS_BYTES_PER_LOGIT = 8
# Logit distillation: three tensors of that many bytes (objectives.logit_distillation.CHUNK_BYTES).
DISTILLATION_BYTES = 3 * 256 * 2**20


@dataclass(frozen=True)
class Memory:
    """Expected bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    teacher_targets: float
    activations: float
    loss_logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def summary_lines(
    recipe: Recipe, architecture: Architecture, world_size: int, teacher: Architecture
) -> list[tuple[str, str]]:
    """What the run will do, as (label, text) of some twenty lines; a label that begins with a space belongs to the one
    above.

    Args:
        recipe: has passed `check_recipe`.
        architecture: of model.hf; teacher: of teacher.hf, also where that is model.hf.
    """
    return [
        *_rank_lines(recipe, world_size),
        *_token_lines(recipe),
        _loss_line(recipe),
        *_model_lines(recipe, architecture),
        *_memory_lines(recipe, architecture, teacher, world_size),
        *_skipped_lines(recipe, teacher),
    ]


def in_columns(lines: Sequence[tuple[str, str]]) -> str:
    """Labels on the left, texts on the right."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def expected_memory(recipe: Recipe, architecture: Architecture, teacher: Architecture, world_size: int) -> Memory:
    """Bytes on the fullest rank: the maximum over stages of each part, so the total is an upper estimate.

    tp, pp, cp, dp: degrees of parallelism. T: tokens of a micro-batch. h: hidden size. b: bytes of a number.

    - parameters = b * N, gradients = 4 * N, optimizer = (12 with bf16, 8 with fp32) * N / (dp * cp),
      N = (layers / pp * parameters of a layer + embedding or head) / tp
    - teacher = b * its N, without the layers above the deepest compared one and without a head no loss needs
    - teacher targets = b * h * T / cp * compared layers of a stage, summed over the replica's micro-batches
    - activations = b * T / cp * (elements kept of a token) * layers of a stage * micro-batches in flight;
      recompute full keeps h, and one layer's working set on top; otherwise all of it (`_layer_elements`)
    - with sequence parallelism, hidden states count T / cp / tp tokens
    - loss = 1024 tokens * vocabulary / tp * 8 (fp32 logits and their gradient); 768 MiB for logit distillation, less
      where a rank's logits are fewer
    """
    parallel, size = recipe.parallel, PARAMETER_BYTES[recipe.precision.params]
    replicas = _replicas(recipe, world_size)
    parameters = _stage_parameters(recipe, architecture, architecture.num_layers, True)
    return Memory(
        parameters=size * parameters,
        gradients=GRADIENT_BYTES * parameters,
        optimizer=OPTIMIZER_BYTES[recipe.precision.params] * parameters / (replicas * parallel.context),
        teacher=size * _stage_parameters(recipe, teacher, _deepest_layer(recipe, teacher), _has_teacher_head(recipe)),
        teacher_targets=_target_elements(recipe, teacher, replicas) * size,
        activations=_activation_elements(recipe, architecture, replicas) * size,
        loss_logits=_loss_bytes(recipe, architecture),
    )


def _rank_lines(recipe: Recipe, world_size: int) -> list[tuple[str, str]]:
    parallel, replicas = recipe.parallel, _replicas(recipe, world_size)
    chunks = f", {parallel.virtual_pipeline} chunks a stage" if parallel.virtual_pipeline else ""
    tokens = recipe.step.tokens_per_microbatch
    return [
        (
            "world",
            f"{world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} x data {replicas}{chunks}",
        ),
        (
            "micro-batches",
            f"{recipe.num_microbatches} a step = {recipe.num_microbatches // replicas} on each of "
            f"{replicas} replicas; {tokens:,} tokens each, {tokens // parallel.context:,} on a rank",
        ),
    ]


def _token_lines(recipe: Recipe) -> list[tuple[str, str]]:
    tokens, steps = recipe.step.tokens_per_microbatch, recipe.training.steps
    total = tokens * recipe.num_microbatches
    lines = [("tokens a step", f"{total:,}")]
    for name, settings in recipe.objectives.items():
        count = settings.microbatches * tokens
        sequences = count // settings.sequence_length
        lines.append((f"  {name}", f"{count:,} ({count / total:.1%}): {sequences:,} x {settings.sequence_length:,}"))
    lines.append(("tokens in all", f"{total * steps:,} = {steps:,} steps x {total:,}"))
    return lines


def _loss_line(recipe: Recipe) -> tuple[str, str]:
    """weight * micro-batches / M of each objective; M = micro-batches of the step."""
    terms = []
    for name, settings in recipe.objectives.items():
        layers = f" (sum of {len(settings.layers)} layers)" if isinstance(settings, ShortRestoration) else ""
        terms.append(f"{settings.weight * settings.microbatches / recipe.num_microbatches:.4g} {name}{layers}")
    return ("step loss", " + ".join(terms) + f"   (weight x micro-batches / {recipe.num_microbatches})")


def _model_lines(recipe: Recipe, architecture: Architecture) -> list[tuple[str, str]]:
    settings = recipe.model.rope.model_dump(exclude={"method"}, exclude_none=True)
    details = "".join(f", {name} {value:g}" for name, value in settings.items())
    return [
        ("parameters", f"{architecture.num_parameters():,}"),
        (
            "window",
            f"{architecture.max_position_embeddings:,} -> {recipe.model.max_position_embeddings:,} tokens, "
            f"rope {recipe.model.rope.method}{details}",
        ),
    ]


def _memory_lines(
    recipe: Recipe, architecture: Architecture, teacher: Architecture, world_size: int
) -> list[tuple[str, str]]:
    memory = expected_memory(recipe, architecture, teacher, world_size)
    lines = [("memory a rank", f"about {memory.total / GIB:.1f} GiB, rough, fullest stage")]
    formulas = {
        "parameters": f"{PARAMETER_BYTES[recipe.precision.params]} bytes x N",
        "gradients": f"{GRADIENT_BYTES} bytes x N",
        "optimizer": f"{OPTIMIZER_BYTES[recipe.precision.params]} bytes x N / (data x context)",
        "teacher": "forward only: no gradients, no optimizer",
        "teacher_targets": "hidden states of the compared layers, kept for the student's pass",
        "activations": f"recompute {recipe.training.recompute}",
        "loss_logits": "a chunk of tokens at a time",
    }
    for name, formula in formulas.items():
        lines.append((f"  {name.replace('_', ' ')}", f"{getattr(memory, name) / GIB:.2f} GiB ({formula})"))
    return lines


def _skipped_lines(recipe: Recipe, teacher: Architecture) -> list[tuple[str, str]]:
    """What no loss uses, and so is not computed."""
    objectives = dict(recipe.objectives.items())
    without_teacher = [name for name, settings in objectives.items() if not settings.needs_teacher]
    without_head = [name for name in objectives if name in ("short_to_long", "short_restoration")]
    skipped = []
    if not recipe.needs_teacher:
        skipped.append("the teacher (no objective compares with it)")
    else:
        if without_teacher:
            skipped.append(f"the teacher on {', '.join(without_teacher)}")
        depth = _deepest_layer(recipe, teacher)
        if depth < teacher.num_layers:
            skipped.append(f"the teacher's layers {depth + 1} to {teacher.num_layers}")
        if not _has_teacher_head(recipe):
            skipped.append("the teacher's head")
    if without_head:
        skipped.append(f"the model's head on {', '.join(without_head)}")
    return [("not computed", "; ".join(skipped) or "nothing")]


def _loss_bytes(recipe: Recipe, architecture: Architecture) -> float:
    """What is alive of the logits, of whichever loss needs most."""
    objectives, parallel = recipe.objectives, recipe.parallel
    entries, tokens = architecture.vocab_size / parallel.tensor, recipe.step.tokens_per_microbatch / parallel.context
    needs = [0.0]
    if _has_teacher_head(recipe):
        needs.append(min(DISTILLATION_BYTES, 3 * 4 * tokens * entries))
    if objectives.long_text is not None or (objectives.packed_distillation and not _has_teacher_head(recipe)):
        needs.append(min(LOSS_CHUNK_TOKENS, tokens) * entries * LOSS_BYTES_PER_LOGIT)
    return max(needs)


def _replicas(recipe: Recipe, world_size: int) -> int:
    return world_size // (recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context)


def _deepest_layer(recipe: Recipe, teacher: Architecture) -> int:
    """The last layer the teacher has to run; 0 where there is no teacher."""
    if recipe.objectives.short_to_long is not None or _has_teacher_head(recipe):
        return teacher.num_layers
    restoration = recipe.objectives.short_restoration
    return 0 if restoration is None else max(restoration.layers)


def _has_teacher_head(recipe: Recipe) -> bool:
    packed = recipe.objectives.packed_distillation
    return packed is not None and packed.needs_teacher


def _stage_parameters(recipe: Recipe, architecture: Architecture, num_layers: int, with_head: bool) -> float:
    """Parameters of the fullest rank, with the lowest `num_layers` layers spread over the stages as they are."""
    if num_layers == 0:
        return 0
    parallel = recipe.parallel
    embedding = architecture.vocab_size * architecture.hidden_size
    ends = 1 if architecture.tied_embeddings else 2
    counts = [sum(number <= num_layers for number in stage) for stage in _stages(recipe, architecture)]
    # With one stage the embedding and an untied head share a rank.
    tables = ends if parallel.pipeline == 1 and with_head else 1
    return (max(counts) * architecture.layer_parameters() + tables * embedding) / parallel.tensor


def _stages(recipe: Recipe, architecture: Architecture) -> list[list[int]]:
    """Layer numbers (from 1) of each pipeline stage."""
    depth, pipeline = architecture.num_layers, recipe.parallel.pipeline
    chunks = recipe.parallel.for_depth(depth).chunk_layers(depth)
    return [[number for chunk in chunks[stage::pipeline] for number in chunk] for stage in range(pipeline)]


def _rank_tokens(recipe: Recipe) -> float:
    """Tokens of a micro-batch whose hidden states one rank keeps."""
    parallel = recipe.parallel
    return recipe.step.tokens_per_microbatch / parallel.context / (parallel.tensor if parallel.sequence else 1)


def _target_elements(recipe: Recipe, teacher: Architecture, replicas: int) -> float:
    """Teacher hidden states kept between the teacher's pass and the student's, on the fullest stage."""
    fullest = 0
    for stage in _stages(recipe, teacher):
        states = 0
        for _, settings in recipe.objectives.items():
            if settings.needs_teacher:
                layers = settings.layers if isinstance(settings, ShortRestoration) else (teacher.num_layers,)
                share = -(-settings.microbatches // replicas)  # shares of replicas differ by one at most
                states += share * sum(layer in stage for layer in layers)
        fullest = max(fullest, states)
    return fullest * _rank_tokens(recipe) * teacher.hidden_size


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
    return in_flight * layers * working_set


def _layer_elements(recipe: Recipe, architecture: Architecture) -> float:
    """What one layer keeps of one micro-batch."""
    kept = architecture.layer_activations()
    tokens = recipe.step.tokens_per_microbatch / recipe.parallel.context
    return _rank_tokens(recipe) * kept.whole + tokens * kept.split / recipe.parallel.tensor
