"""What only the whole picture shows: recipe against architecture, teachers, data sets and world size."""

import math
from collections.abc import Iterator, Sequence

from longred_megatron.device import on_gpu
from longred_megatron.errors import listed, multiples
from longred_megatron.families import Architecture
from longred_megatron.precision import Card, Sizes
from longred_megatron.recipe.phases import Phase
from longred_megatron.recipe.problems import nearest
from longred_megatron.recipe.schema import Recipe
from longred_megatron.rope.frequencies import frequency_problem


def check_phases(phases: Sequence[Phase], world_size: int, *, gpu: bool | None = None) -> list[str]:
    """Every problem as a sentence: key, value, rule, nearest valid values. Empty: the run can be started.

    Those that all phases share come once, the others after their phase's path.

    Args:
        world_size: ranks of the run.
        gpu: whether the run will have GPUs; None: whether this machine has one.
    """
    found = [check_phase(phase, world_size, gpu=gpu, phases=phases) for phase in phases]
    shared = [problem for problem in found[0] if all(problem in own for own in found)]
    return shared + [f"phases[{i}]: {p}" for i, own in enumerate(found) for p in own if p not in shared]


def check_phase(phase: Phase, world_size: int, *, gpu: bool | None = None, phases: Sequence[Phase] = ()) -> list[str]:
    """The problems of one phase. phases: all of the run; what another one uses is not useless."""
    recipe, source = phase.recipe, phase.source
    found = [
        *_window_problems(recipe, source),
        *_rope_problems(phase),
        *(p for n, o in recipe.objectives.items() for p in o.problems(f"objectives.{n}", phase.sites[n])),
        *_teacher_problems(phase, phases),
        *_cache_problems(phase, phases),
        *_data_problems(recipe, [each.recipe for each in phases]),
        *_model_cut_problems(recipe, "model.hf", source),
        *(
            p
            for hf, each in phase.teachers.items()
            for p in _teacher_cut_problems(recipe, f"teacher {hf}", each)
            if hf != recipe.model.hf
        ),
        *_token_cut_problems(recipe),
        *_tensor_overlap_problems(recipe, gpu),
        *_world_problems(recipe, world_size),
        *_trainable_problems(recipe, source),
        *_optimizer_problems(recipe),
        *_precision_problems(phase, gpu),
    ]
    return list(dict.fromkeys(found))  # objectives of one length say the same of the step


def _window_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    target, original = recipe.model.max_position_embeddings, architecture.max_position_embeddings
    if target < original:
        yield (
            f"`model.max_position_embeddings` is {target}: shorter than the {original} tokens model.hf "
            f"already has; set it to {original} or more"
        )


def _rope_problems(phase: Phase) -> Iterator[str]:
    method, source = phase.recipe.model.rope, phase.rope_source
    found = list(method.problems("model.rope", source))
    if found:
        yield from found
        return
    extended = method.extended(source)
    if problem := frequency_problem(extended, source.head_dim, source.target_window):
        yield f"`model.rope` with its settings on model.hf: {problem}; change them"
    written = extended["rope_type"]
    if written not in phase.source.rope_types:
        yield (
            f"`model.rope.method` is {method.method!r}: transformers does not read {written} RoPE in a "
            f"{phase.source.family} model, so the trained model could not be exported; use abf or none"
        )


def _teacher_problems(phase: Phase, phases: Sequence[Phase]) -> Iterator[str]:
    hf = phase.recipe.teacher.hf
    if hf == phase.recipe.model.hf:
        return
    if not any(each.recipe.teacher.hf == hf and hf in each.teachers for each in (phase, *phases)):
        yield (
            f"`teacher.hf` is {hf}: has no effect, since no objective compares with it; remove it, or add an objective "
            "that does"
        )


def _cache_problems(phase: Phase, phases: Sequence[Phase]) -> Iterator[str]:
    """Settings of a cache that nothing is kept in."""
    recipe = phase.recipe
    sections = {f"objectives.{name}.teacher": each.teacher for name, each in recipe.objectives.items() if each.teacher}
    for where, settings in {"teacher": recipe.teacher, **sections}.items():
        if settings.cache is None and settings.cache_format != "exact":
            yield f"`{where}.cache_format` is {settings.cache_format!r}: has no effect without `{where}.cache`"
    folder = recipe.teacher.cache
    if folder is not None and not any(folder in each.caches().values() for each in (phase, *phases)):
        yield f"`teacher.cache` is {folder}: has no effect, since no objective compares with that teacher; remove it"


def _data_problems(recipe: Recipe, phases: Sequence[Recipe]) -> Iterator[str]:
    used = {settings.data for phase in phases for settings in phase.objectives.values()}
    for name, settings in recipe.objectives.items():
        used.add(settings.data)
        if settings.data not in recipe.data:
            hint = nearest(settings.data, recipe.data)
            advice = f"did you mean {hint!r}?" if hint else f"`data` has {listed(recipe.data) or 'none'}"
            yield f"`objectives.{name}.data` is {settings.data!r}: no such data set; {advice}"
    for name in recipe.data:
        if name not in used:
            yield (
                f"`data.{name}` has no effect: no objective uses it; remove it (data.{name}: null if it is inherited)"
            )


def _model_cut_problems(recipe: Recipe, whose: str, architecture: Architecture) -> Iterator[str]:
    """Whether tensor and pipeline parallelism can cut this architecture."""
    parallel = recipe.parallel
    yield from _tensor_cut_problems(recipe, whose, architecture)
    chunks = parallel.num_chunks
    if parallel.layers_per_chunk is not None:
        sizes = list(parallel.layers_per_chunk)
        if chunks == 1:
            yield f"`parallel.layers_per_chunk` is {sizes}: has no effect at `parallel.pipeline` 1; set it to null"
        elif len(sizes) != chunks or sum(sizes) != architecture.num_layers:
            yield (
                f"`parallel.layers_per_chunk` is {sizes}: must be {chunks} numbers, one for each of pipeline x "
                f"virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline or 1} chunks, that add up to the "
                f"{architecture.num_layers} layers of {whose}{_even_split(architecture.num_layers, chunks)}"
            )
    elif architecture.num_layers % chunks:
        yield (
            f"`parallel.pipeline` x `parallel.virtual_pipeline` is {parallel.pipeline} x "
            f"{parallel.virtual_pipeline or 1} = {chunks}: must divide the {architecture.num_layers} layers "
            f"of {whose}; nearest products: {_divisors(architecture.num_layers, chunks)}, "
            f"or set `parallel.layers_per_chunk`{_even_split(architecture.num_layers, chunks)}"
        )


def _teacher_cut_problems(recipe: Recipe, whose: str, architecture: Architecture) -> Iterator[str]:
    """The same for a teacher, which is split by its own depth."""
    parallel = recipe.parallel
    yield from _tensor_cut_problems(recipe, whose, architecture)
    if architecture.num_layers < parallel.num_chunks:
        yield (
            f"`parallel.pipeline` x `parallel.virtual_pipeline` is {parallel.pipeline} x "
            f"{parallel.virtual_pipeline or 1} = {parallel.num_chunks}: more than the {architecture.num_layers} layers "
            f"of {whose}; use {architecture.num_layers} or less"
        )


def _tensor_cut_problems(recipe: Recipe, whose: str, architecture: Architecture) -> Iterator[str]:
    parallel = recipe.parallel
    heads, kv_heads = architecture.num_attention_heads, architecture.num_kv_heads
    cut = math.gcd(heads, kv_heads, architecture.intermediate_size)
    if cut % parallel.tensor:
        yield (
            f"`parallel.tensor` is {parallel.tensor}: must divide the {heads} attention heads, {kv_heads} "
            f"key/value heads and {architecture.intermediate_size} feed-forward units of {whose}; "
            f"nearest: {_divisors(cut, parallel.tensor)}"
        )


def _token_cut_problems(recipe: Recipe) -> Iterator[str]:
    """Whether sequence parallelism can cut the micro-batches; context parallelism: each objective says it."""
    context, tensor = recipe.parallel.context, recipe.parallel.tensor
    tokens = recipe.step.tokens_per_microbatch
    if recipe.parallel.sequence and tensor == 1:
        yield "`parallel.sequence` is true: has no effect at `parallel.tensor` 1; set it to false"
    elif recipe.parallel.sequence and tokens % (context * tensor):
        yield (
            f"`step.tokens_per_microbatch` is {tokens}: must be a multiple of context x tensor = {context} "
            f"x {tensor} with sequence parallelism; nearest: {multiples(tokens, context * tensor)}"
        )


def _tensor_overlap_problems(recipe: Recipe, gpu: bool | None) -> Iterator[str]:
    if not recipe.parallel.tp_comm_overlap:
        return
    said = "`parallel.tp_comm_overlap` is true"
    if not (on_gpu() if gpu is None else gpu):
        yield f"{said}: needs a GPU, and none is used; set it to false"
    if not recipe.parallel.sequence:
        yield f"{said}: needs `parallel.sequence`: true; set that, or this to false"
    if recipe.precision.fp8:
        yield f"{said}: its buffers are for bf16, and `precision.fp8` is {recipe.precision.fp8!r}; set one of them off"


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
            f"start {multiples(world_size, ranks)} ranks or change `parallel`"
        )
        return
    replicas, microbatches = world_size // ranks, recipe.num_microbatches
    sizes = " + ".join(f"{name} {settings.microbatches}" for name, settings in recipe.objectives.items())
    if microbatches % replicas:
        yield (
            f"the step has {microbatches} micro-batches ({sizes}): must be a multiple of the {replicas} "
            f"data-parallel replicas ({world_size} ranks / {ranks}); nearest: "
            f"{multiples(microbatches, replicas)}"
        )
    elif parallel.virtual_pipeline is not None and microbatches // replicas % parallel.pipeline:
        yield (
            f"each replica has {microbatches // replicas} micro-batches a step ({microbatches} / "
            f"{replicas}): with `parallel.virtual_pipeline` it must be a multiple of `parallel.pipeline` "
            f"{parallel.pipeline}; nearest for the step: "
            f"{multiples(microbatches, replicas * parallel.pipeline)}"
        )


def _trainable_problems(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    parts, parallel = recipe.training.trainable, recipe.parallel
    if parts is None:
        return
    if "head" in parts and architecture.tied_embeddings:
        yield "`training.trainable` holds head: model.hf has none of its own, it ties it to the embedding; name that"
    elif parallel.pipeline > 1 and not {"attention", "mlp", "norm"} & set(parts):
        yield (
            f"`training.trainable` is {list(parts)}: with `parallel.pipeline` {parallel.pipeline} every stage has to "
            "train something; add a part of the layers, or use pipeline 1"
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


def _precision_problems(phase: Phase, gpu: bool | None) -> Iterator[str]:
    """gpu: None asks this machine, and its card."""
    precision, parallel, source = phase.recipe.precision, phase.recipe.parallel, phase.source
    here = gpu is None and on_gpu()
    if here and precision.params == "fp32":
        yield (
            "`precision.params` is 'fp32': there is no fused attention for it on a GPU, and the unfused one holds "
            "heads x length x length numbers; set it to bf16 (the optimizer keeps fp32 copies), or LONGRED_DEVICE=cpu"
        )
    if precision.fp8 is not None and not (gpu or here):
        yield f"`precision.fp8` is {precision.fp8!r}: needs a GPU, and none is used; set it to null"
        return
    if precision.teacher_fp8 and not phase.teachers:
        yield "`precision.teacher_fp8` is true: has no effect, since no objective compares with a teacher; remove it"
    tokens, models = phase.recipe.step.tokens_per_microbatch // parallel.context, {"model.hf": source}
    if precision.teacher_fp8:
        models |= {f"teacher {hf}": teacher for hf, teacher in phase.teachers.items()}
    widths = {}
    for whose, model in models.items():
        of_heads = model.num_attention_heads * model.head_dim
        widths[f"hidden_size of {whose} is"] = model.hidden_size
        widths[f"intermediate_size of {whose} is"] = model.intermediate_size // parallel.tensor
        widths[f"attention's width of {whose} is"] = of_heads // parallel.tensor
    sizes = Sizes(
        rank_tokens=tokens // (parallel.tensor if parallel.sequence else 1),
        widths=widths,
        head_dims={whose: model.head_dim for whose, model in models.items()},
    )
    yield from precision.problems(sizes, Card.here() if here and precision.fp8 else None)


def _even_split(number: int, parts: int) -> str:
    """An example of `parts` positive numbers with the sum `number`; nothing where there is none."""
    sizes = [(i + 1) * number // parts - i * number // parts for i in range(parts)]
    return f", for instance {sizes}" if min(sizes) > 0 else ""


def _divisors(number: int, value: int) -> str:
    """The divisors of `number` on both sides of `value`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return listed([*[d for d in divisors if d < value][-1:], *[d for d in divisors if d > value][:1]])
