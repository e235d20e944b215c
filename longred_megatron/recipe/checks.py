"""What only the whole picture shows: recipe against architecture, teacher, data sets and world size."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from longred_megatron.families.architecture import Architecture
from longred_megatron.recipe.problems import nearest
from longred_megatron.recipe.schema import PackedDistillation, Recipe, ShortRestoration, ShortToLong
from longred_megatron.rope.methods import AbfRope, PiRope, UnchangedRope, YarnRope

MIN_SKIPPED_TOKENS = 3  # one id each for the head, the middle and the tail of skipped positions


def check_recipe(
    recipe: Recipe,
    architecture: Architecture,
    teacher: Architecture | None,
    world_size: int,
    *,
    gpu: bool | None = None,
    phases: Sequence[Recipe] = (),
) -> list[str]:
    """Every problem as a sentence: key, value, rule, nearest valid values. Empty: the recipe can run.

    Args:
        architecture: of model.hf, as released (with its own window and RoPE).
        teacher: of teacher.hf; None where that is model.hf.
        world_size: ranks of the run.
        gpu: whether the run will have GPUs; None: whether this machine has one.
        phases: of the run that `recipe` is a phase of; what another one uses is not useless.
    """
    teacher = teacher or architecture
    return [
        *_window_problems(recipe, architecture),
        *_rope_problems(recipe, architecture),
        *_length_problems(recipe, teacher),
        *_layer_problems(recipe, architecture),
        *_teacher_problems(recipe, architecture, teacher, phases),
        *_packed_problems(recipe, architecture),
        *_data_problems(recipe, phases),
        *_model_cut_problems(recipe, "model.hf", architecture),
        *(_model_cut_problems(recipe, "teacher.hf", teacher) if _has_other_teacher(recipe) else ()),
        *_token_cut_problems(recipe),
        *_world_problems(recipe, world_size),
        *_optimizer_problems(recipe),
        *_precision_problems(recipe, gpu),
    ]


def rope_extension(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    """Keyword arguments for `objectives.rope.extended_rope`; a factor left out is target / original "
    "window."""
    original = architecture.max_position_embeddings
    settings = recipe.model.rope.model_dump()
    if "factor" in settings and settings["factor"] is None:
        settings["factor"] = recipe.model.max_position_embeddings / original
    return {**settings, "original_window": original}


def _window_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    target, original = recipe.model.max_position_embeddings, architecture.max_position_embeddings
    if target < original:
        yield (
            f"`model.max_position_embeddings` is {target}: shorter than the {original} tokens model.hf "
            f"already has; set it to {original} or more"
        )
    if recipe.objectives.short_to_long is not None and target == original:
        yield (
            f"`objectives.short_to_long` has no effect: `model.max_position_embeddings` is {target}, which "
            "model.hf already has, so no position can be skipped; raise the window or remove the objective"
        )


def _rope_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    rope, source = recipe.model.rope, architecture.rope
    if isinstance(rope, AbfRope):
        theta = source["rope_theta"]
        if rope.theta <= theta:
            effect = "has no effect: it is" if rope.theta == theta else "is below"
            yield (
                f"`model.rope.theta` is {rope.theta:g}: {effect} the {theta:g} of model.hf; a longer window "
                "needs a larger base; raise it, or use rope: none"
            )
    elif not isinstance(rope, UnchangedRope):
        yield from _interpolation_problems(recipe, rope, architecture)


def _interpolation_problems(recipe: Recipe, rope: PiRope | YarnRope, architecture: Architecture) -> Iterator[str]:
    rope_type = architecture.rope.get("rope_type", "default")
    if rope_type != "default":
        yield (
            f"`model.rope.method` is {rope.method!r}: model.hf already has scaled RoPE ({rope_type}), which "
            "cannot be scaled twice; use abf, which keeps its scaling, or none"
        )
    original, target = architecture.max_position_embeddings, recipe.model.max_position_embeddings
    ratio = target / original
    if rope.factor is None and ratio <= 1:
        yield (
            f"`model.rope.factor` is left out and {target} / {original} gives {ratio:g}: must be greater "
            "than 1; raise `model.max_position_embeddings` or use rope: none"
        )
    if rope.factor is not None and rope.factor < ratio:
        yield (
            f"`model.rope.factor` is {rope.factor:g}: reaches only {int(rope.factor * original)} of the "
            f"{target} positions of `model.max_position_embeddings`; use {ratio:g} or leave it out"
        )
    if isinstance(rope, YarnRope) and rope.beta_fast <= rope.beta_slow:
        yield (
            f"`model.rope.beta_fast` is {rope.beta_fast:g}: must be greater than beta_slow "
            f"{rope.beta_slow:g}; YaRN's own values are 32 and 1"
        )


def _length_problems(recipe: Recipe, teacher: Architecture) -> Iterator[str]:
    target, tokens = recipe.model.max_position_embeddings, recipe.step.tokens_per_microbatch
    for name, settings in recipe.objectives.items():
        path, length = f"`objectives.{name}.sequence_length`", settings.sequence_length
        if length > target:
            yield (
                f"{path} is {length}: longer than the target window, `model.max_position_embeddings` "
                f"{target}; use {target} or less, or raise the window"
            )
        elif settings.needs_teacher and length > teacher.max_position_embeddings:
            yield (
                f"{path} is {length}: longer than the teacher's window of {teacher.max_position_embeddings} "
                f"tokens, past which it is no guide; use {teacher.max_position_embeddings} or less"
            )
        if tokens % length:
            yield (
                f"`step.tokens_per_microbatch` is {tokens}: must be a multiple of {path} {length}; "
                f"nearest: {_multiples(tokens, length)}"
            )
        skips = isinstance(settings, ShortToLong) and settings.positions != "natural"
        if skips and length < MIN_SKIPPED_TOKENS:
            yield f"{path} is {length}: skipped positions need at least {MIN_SKIPPED_TOKENS}"


def _layer_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    if recipe.objectives.short_restoration is None:
        return
    path, layers = "`objectives.short_restoration.layers`", recipe.objectives.short_restoration.layers
    outside = [layer for layer in layers if not 1 <= layer <= architecture.num_layers]
    if outside:
        yield f"{path} holds {_listed(outside)}: the layers of model.hf are 1 to {architecture.num_layers}"
    if list(layers) != sorted(set(layers)):
        what = "names a layer twice" if len(set(layers)) < len(layers) else "is not in ascending order"
        in_order = sorted(set(layers) - set(outside))
        yield f"{path} is {list(layers)}: {what}; write {in_order}"


def _teacher_problems(
    recipe: Recipe, architecture: Architecture, teacher: Architecture, phases: Sequence[Recipe]
) -> Iterator[str]:
    if not _has_other_teacher(recipe):
        return
    if not recipe.needs_teacher:
        if any(phase.needs_teacher and phase.teacher == recipe.teacher for phase in phases):
            return
        yield (
            f"`teacher.hf` is {recipe.teacher.hf}: has no effect, since no objective compares with a "
            "teacher; remove it, or add short_restoration, short_to_long or packed_distillation"
        )
        return
    kinds = (ShortRestoration, ShortToLong)
    restoring = [name for name, settings in recipe.objectives.items() if isinstance(settings, kinds)]
    if not restoring:
        return
    same = [("hidden_size", "hidden states"), ("vocab_size", "token ids")]
    if recipe.objectives.short_restoration is not None:
        same.append(("num_layers", "layers"))
    for attribute, compared in same:
        ours, theirs = getattr(architecture, attribute), getattr(teacher, attribute)
        if ours != theirs:
            yield (
                f"`teacher.hf` is {recipe.teacher.hf} with {attribute} {theirs}: must be the {ours} of "
                f"model.hf, since {_listed(restoring)} compare {compared} one to one; choose a teacher of "
                "that size"
            )


def _packed_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    packed = recipe.objectives.packed_distillation
    if packed is None:
        return
    path = "`objectives.packed_distillation"
    if packed.top_k is not None and packed.top_k >= architecture.vocab_size:
        yield (
            f"{path}.top_k` is {packed.top_k}: has no effect, model.hf has {architecture.vocab_size} tokens; leave it "
            "out, or use less"
        )
    if not packed.needs_teacher:
        for key in ("direction", "temperature", "top_k"):
            value, default = getattr(packed, key), PackedDistillation.model_fields[key].default
            if value != default:
                yield (
                    f"{path}.{key}` is {value}: has no effect, since cross_entropy is 1 and no teacher is compared "
                    "with; leave it out, or lower cross_entropy"
                )
    if packed.mask_documents and recipe.precision.fp8_attention:
        yield (
            f"{path}.mask_documents` is true: Transformer Engine's FP8 attention does not train on packed documents; "
            "set `precision.fp8_attention` to false, or mask_documents to false"
        )


def _data_problems(recipe: Recipe, phases: Sequence[Recipe]) -> Iterator[str]:
    used = {settings.data for phase in phases for _, settings in phase.objectives.items()}
    for name, settings in recipe.objectives.items():
        used.add(settings.data)
        if settings.data not in recipe.data:
            hint = nearest(settings.data, recipe.data)
            advice = f"did you mean {hint!r}?" if hint else f"`data` has {_listed(recipe.data) or 'none'}"
            yield f"`objectives.{name}.data` is {settings.data!r}: no such data set; {advice}"
    for name in recipe.data:
        if name not in used:
            yield (
                f"`data.{name}` has no effect: no objective uses it; remove it (data.{name}: null if it is inherited)"
            )


def _model_cut_problems(recipe: Recipe, whose: str, architecture: Architecture) -> Iterator[str]:
    """Whether tensor and pipeline parallelism can cut this architecture."""
    parallel = recipe.parallel
    heads, kv_heads = architecture.num_attention_heads, architecture.num_kv_heads
    cut = math.gcd(heads, kv_heads, architecture.intermediate_size)
    if cut % parallel.tensor:
        yield (
            f"`parallel.tensor` is {parallel.tensor}: must divide the {heads} attention heads, {kv_heads} "
            f"key/value heads and {architecture.intermediate_size} feed-forward units of {whose}; "
            f"nearest: {_divisors(cut, parallel.tensor)}"
        )
    chunks = parallel.num_chunks
    if parallel.layers_per_stage is not None and whose == "model.hf":
        sizes = list(parallel.layers_per_stage)
        if chunks == 1:
            yield f"`parallel.layers_per_stage` is {sizes}: has no effect at `parallel.pipeline` 1; set it to null"
        elif len(sizes) != chunks or sum(sizes) != architecture.num_layers:
            yield (
                f"`parallel.layers_per_stage` is {sizes}: must be {chunks} numbers, one for each of pipeline x "
                f"virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline or 1} chunks, that add up to the "
                f"{architecture.num_layers} layers of {whose}{_even_split(architecture.num_layers, chunks)}"
            )
    elif whose == "teacher.hf":  # split by its own depth
        if architecture.num_layers < chunks:
            yield (
                f"`parallel.pipeline` x `parallel.virtual_pipeline` is {parallel.pipeline} x "
                f"{parallel.virtual_pipeline or 1} = {chunks}: more than the {architecture.num_layers} layers of "
                f"{whose}; use {architecture.num_layers} or less"
            )
    elif architecture.num_layers % chunks:
        yield (
            f"`parallel.pipeline` x `parallel.virtual_pipeline` is {parallel.pipeline} x "
            f"{parallel.virtual_pipeline or 1} = {chunks}: must divide the {architecture.num_layers} layers "
            f"of {whose}; nearest products: {_divisors(architecture.num_layers, chunks)}, "
            f"or set `parallel.layers_per_stage`{_even_split(architecture.num_layers, chunks)}"
        )


def _token_cut_problems(recipe: Recipe) -> Iterator[str]:
    """Whether context and sequence parallelism can cut the micro-batches."""
    context, tensor = recipe.parallel.context, recipe.parallel.tensor
    tokens = recipe.step.tokens_per_microbatch
    if recipe.parallel.sequence and tensor == 1:
        yield "`parallel.sequence` is true: has no effect at `parallel.tensor` 1; set it to false"
    elif recipe.parallel.sequence and tokens % (context * tensor):
        yield (
            f"`step.tokens_per_microbatch` is {tokens}: must be a multiple of context x tensor = {context} "
            f"x {tensor} with sequence parallelism; nearest: {_multiples(tokens, context * tensor)}"
        )
    for name, settings in recipe.objectives.items():
        path, length = f"`objectives.{name}", settings.sequence_length
        if settings.context_parallel not in (None, 1, context):
            allowed = "1" if context == 1 else f"1 or `parallel.context` {context}"
            yield f"{path}.context_parallel` is {settings.context_parallel}: must be {allowed}"
        elif context == 1:
            continue
        elif settings.context_parallel != 1 and length % (2 * context):
            yield (
                f"{path}.sequence_length` is {length}: must be a multiple of 2 x `parallel.context` = "
                f"{2 * context}, as each rank takes two equal pieces; nearest: "
                f"{_multiples(length, 2 * context)}, or set context_parallel: 1"
            )
        elif settings.context_parallel == 1 and tokens % length == 0 and tokens // length % context:
            yield (
                f"{path}.context_parallel` is 1: the {tokens // length} sequences of a micro-batch must be "
                f"a multiple of `parallel.context` {context}; set `step.tokens_per_microbatch` to a "
                f"multiple of {length * context} (nearest: {_multiples(tokens, length * context)}) or leave "
                "context_parallel out"
            )


def _world_problems(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Whether ranks and micro-batches can be dealt out evenly."""
    parallel = recipe.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield (
            f"`parallel.virtual_pipeline` is {parallel.virtual_pipeline}: has no effect at "
            "`parallel.pipeline` 1; set it to null"
        )
    if world_size % ranks:
        yield (
            f"the world has {world_size} ranks: must be a multiple of tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {ranks}; "
            f"start {_multiples(world_size, ranks)} ranks or change `parallel`"
        )
        return
    replicas, microbatches = world_size // ranks, recipe.num_microbatches
    sizes = " + ".join(f"{name} {settings.microbatches}" for name, settings in recipe.objectives.items())
    if microbatches % replicas:
        yield (
            f"the step has {microbatches} micro-batches ({sizes}): must be a multiple of the {replicas} "
            f"data-parallel replicas ({world_size} ranks / {ranks}); nearest: "
            f"{_multiples(microbatches, replicas)}"
        )
    elif parallel.virtual_pipeline is not None and microbatches // replicas % parallel.pipeline:
        yield (
            f"each replica has {microbatches // replicas} micro-batches a step ({microbatches} / "
            f"{replicas}): with `parallel.virtual_pipeline` it must be a multiple of `parallel.pipeline` "
            f"{parallel.pipeline}; nearest for the step: "
            f"{_multiples(microbatches, replicas * parallel.pipeline)}"
        )


def _optimizer_problems(recipe: Recipe) -> Iterator[str]:
    optimizer, steps = recipe.optimizer, recipe.training.steps
    if optimizer.warmup_steps > steps:
        yield (
            f"`optimizer.warmup_steps` is {optimizer.warmup_steps}: longer than the run, `training.steps` "
            f"{steps}; use {steps} or less"
        )
    if optimizer.min_lr > 0 and optimizer.schedule == "constant":
        yield (
            f"`optimizer.min_lr` is {optimizer.min_lr:g}: has no effect with schedule constant; remove it, "
            "or use cosine or linear"
        )
    if optimizer.min_lr > optimizer.lr:
        yield (f"`optimizer.min_lr` is {optimizer.min_lr:g}: greater than `optimizer.lr` {optimizer.lr:g}; lower it")


def _precision_problems(recipe: Recipe, gpu: bool | None) -> Iterator[str]:
    precision = recipe.precision
    if precision.fp8_attention and precision.fp8 is None:
        yield "`precision.fp8_attention` is true: has no effect without `precision.fp8`; set that to hybrid"
    if precision.fp8 is not None:
        if gpu is None:
            import torch  # slow to import, and only this needs it

            gpu = torch.cuda.is_available()
        if not gpu:
            yield f"`precision.fp8` is {precision.fp8!r}: needs a GPU, and there is none; set it to null"


def _has_other_teacher(recipe: Recipe) -> bool:
    return recipe.teacher.hf != recipe.model.hf


def _multiples(value: int, of: int) -> str:
    """The multiples of `of` on both sides of `value`, from `of` on."""
    below, above = value // of * of, -(-value // of) * of
    return _listed([below, above] if 0 < below < above else [above])


def _even_split(number: int, parts: int) -> str:
    """An example of `parts` positive numbers with the sum `number`; nothing where there is none."""
    sizes = [(i + 1) * number // parts - i * number // parts for i in range(parts)]
    return f", for instance {sizes}" if min(sizes) > 0 else ""


def _divisors(number: int, value: int) -> str:
    """The divisors of `number` on both sides of `value`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return _listed([*[d for d in divisors if d < value][-1:], *[d for d in divisors if d > value][:1]])


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
