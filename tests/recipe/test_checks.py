from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longred_megatron.recipe import Architecture, check_recipe, load_recipe, rope_extension
from longred_megatron.recipe.checks import _divisors, _multiples

Write = Callable[..., Path]
Check = Callable[..., list[str]]


@pytest.fixture
def check(write: Write, values: dict[str, Any], architecture: Architecture) -> Check:
    """Problems of the small recipe with overrides and changes to the architecture."""

    def check(
        *overrides: str,
        world_size: int = 1,
        teacher: Architecture | None = None,
        gpu: bool | None = False,
        **changes: Any,
    ) -> list[str]:
        recipe = load_recipe(write(values), overrides)
        return check_recipe(recipe, replace(architecture, **changes), teacher, world_size, gpu=gpu)

    return check


def test_small_recipe_has_no_problem(check: Check) -> None:
    assert check() == []


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("{tensor: 2, sequence: true}", 2),
        ("{tensor: 8, pipeline: 32}", 256),
        ("{pipeline: 2, virtual_pipeline: 2}", 16),  # 2 micro-batches on each of 8 replicas
        ("{context: 2}", 4),
        ("{}", 16),
    ],
)
def test_layouts_without_problem(check: Check, layout: str, world_size: int) -> None:
    assert check(f"parallel={layout}", world_size=world_size) == []


PACKED = "objectives.packed_distillation"
ALONE = ("objectives.short_to_long=null", "data.window=null")

CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "target below original": (
        ("objectives.long_text.sequence_length=4096", *ALONE, "model.max_position_embeddings=4096"),
        {},
        "`model.max_position_embeddings` is 4096: shorter than the 8192 tokens model.hf already has; set it to 8192",
    ),
    "nothing to skip": (
        ("objectives.long_text.sequence_length=8192", "model.max_position_embeddings=8192"),
        {},
        "`objectives.short_to_long` has no effect: `model.max_position_embeddings` is 8192",
    ),
    "theta too small": (
        ("model.rope.theta=1e4",),
        {},
        "`model.rope.theta` is 10000: is below the 500000 of model.hf",
    ),
    "same theta": (
        ("model.rope.theta=5e5",),
        {},
        "`model.rope.theta` is 500000: has no effect: it is the 500000 of model.hf",
    ),
    "scaled twice": (
        ("model.rope={method: yarn}",),
        {"rope": {"rope_type": "llama3", "rope_theta": 5e5}},
        "`model.rope.method` is 'yarn': model.hf already has scaled RoPE (llama3)",
    ),
    "factor too small": (
        ("model.rope={method: pi, factor: 2}",),
        {},
        "`model.rope.factor` is 2: reaches only 16384 of the 32768 positions of "
        "`model.max_position_embeddings`; use 4 or leave it out",
    ),
    "no factor to derive": (
        (
            "model.rope={method: pi}",
            *ALONE,
            "model.max_position_embeddings=8192",
            "objectives.long_text.sequence_length=8192",
        ),
        {},
        "`model.rope.factor` is left out and 8192 / 8192 gives 1: must be greater than 1",
    ),
    "yarn betas": (
        ("model.rope={method: yarn, beta_fast: 1, beta_slow: 32}",),
        {},
        "`model.rope.beta_fast` is 1: must be greater than beta_slow 32",
    ),
    "long text over target": (
        ("objectives.long_text.sequence_length=65536",),
        {},
        "`objectives.long_text.sequence_length` is 65536: longer than the target window, "
        "`model.max_position_embeddings` 32768",
    ),
    "restoration over the teacher's window": (
        ("objectives.short_restoration.sequence_length=16384",),
        {},
        "`objectives.short_restoration.sequence_length` is 16384: longer than the teacher's window of 8192 tokens",
    ),
    "skipped positions over the target": (
        ("objectives.short_to_long.sequence_length=65536",),
        {},
        "`objectives.short_to_long.sequence_length` is 65536: longer than the target window",
    ),
    "tokens not a multiple": (
        ("step.tokens_per_microbatch=73728",),
        {},
        "`step.tokens_per_microbatch` is 73728: must be a multiple of "
        "`objectives.long_text.sequence_length` 32768; nearest: 65536, 98304",
    ),
    "too short to skip": (
        ("objectives.short_to_long.sequence_length=2",),
        {},
        "`objectives.short_to_long.sequence_length` is 2: skipped positions need at least 3",
    ),
    "layers outside": (
        ("objectives.short_restoration.layers=[0, 9, 33]",),
        {},
        "`objectives.short_restoration.layers` holds 0, 33: the layers of model.hf are 1 to 32",
    ),
    "layer twice": (
        ("objectives.short_restoration.layers=[9, 9, 32]",),
        {},
        "`objectives.short_restoration.layers` is [9, 9, 32]: names a layer twice; write [9, 32]",
    ),
    "layers unsorted": (
        ("objectives.short_restoration.layers=[32, 9]",),
        {},
        "`objectives.short_restoration.layers` is [32, 9]: is not in ascending order; write [9, 32]",
    ),
    "no such data set": (
        ("objectives.long_text.data=lnog", "data.long=null"),
        {},
        "`objectives.long_text.data` is 'lnog': no such data set; `data` has short, window",
    ),
    "unused data set": (
        ("data.spare={x: 1}",),
        {},
        "`data.spare` has no effect: no objective uses it; remove it",
    ),
    "tensor": (
        ("parallel.tensor=3",),
        {"world_size": 3},
        "`parallel.tensor` is 3: must divide the 32 attention heads, 8 key/value heads and 14336 "
        "feed-forward units of model.hf; nearest: 2, 4",
    ),
    "tensor over the key/value heads": (
        ("parallel.tensor=16",),
        {"world_size": 16},
        "`parallel.tensor` is 16: must divide the 32 attention heads, 8 key/value heads",
    ),
    "pipeline": (
        ("parallel.pipeline=2", "parallel.virtual_pipeline=3"),
        {"world_size": 2},
        "`parallel.pipeline` x `parallel.virtual_pipeline` is 2 x 3 = 6: must divide the 32 layers of "
        "model.hf; nearest products: 4, 8",
    ),
    "virtual without pipeline": (
        ("parallel.virtual_pipeline=2",),
        {},
        "`parallel.virtual_pipeline` is 2: has no effect at `parallel.pipeline` 1; set it to null",
    ),
    "virtual pipeline and micro-batches": (
        ("parallel.pipeline=4", "parallel.virtual_pipeline=2"),
        {"world_size": 32},
        "each replica has 2 micro-batches a step (16 / 8): with `parallel.virtual_pipeline` it must be a "
        "multiple of `parallel.pipeline` 4; nearest for the step: 32",
    ),
    "sequence without tensor": (
        ("parallel.sequence=true",),
        {},
        "`parallel.sequence` is true: has no effect at `parallel.tensor` 1; set it to false",
    ),
    "context and zig-zag": (
        ("parallel.context=2", "objectives.long_text.sequence_length=2", "step.tokens_per_microbatch=65536"),
        {"world_size": 2},
        "`objectives.long_text.sequence_length` is 2: must be a multiple of 2 x `parallel.context` = 4, as "
        "each rank takes two equal pieces; nearest: 4, or set context_parallel: 1",
    ),
    "context and whole sequences": (
        ("parallel.context=16",),
        {"world_size": 16},
        "`objectives.short_to_long.context_parallel` is 1: the 8 sequences of a micro-batch must be a "
        "multiple of `parallel.context` 16; set `step.tokens_per_microbatch` to a multiple of 131072 "
        "(nearest: 131072)",
    ),
    "part of the context axis": (
        ("parallel.context=4", "objectives.long_text.context_parallel=2"),
        {"world_size": 4},
        "`objectives.long_text.context_parallel` is 2: must be 1 or `parallel.context` 4",
    ),
    "context_parallel without the axis": (
        ("objectives.long_text.context_parallel=2",),
        {},
        "`objectives.long_text.context_parallel` is 2: must be 1",
    ),
    "world": (
        ("parallel={tensor: 2, pipeline: 2}",),
        {"world_size": 6},
        "the world has 6 ranks: must be a multiple of tensor x pipeline x context = 2 x 2 x 1 = 4; start 4, 8 ranks",
    ),
    "replicas": (
        (),
        {"world_size": 3},
        "the step has 16 micro-batches (long_text 8 + short_to_long 2 + short_restoration 6): must be a "
        "multiple of the 3 data-parallel replicas (3 ranks / 1); nearest: 15, 18",
    ),
    "warm-up": (
        ("optimizer.warmup_steps=513",),
        {},
        "`optimizer.warmup_steps` is 513: longer than the run, `training.steps` 512; use 512 or less",
    ),
    "min_lr of a constant schedule": (
        ("optimizer.min_lr=1e-6",),
        {},
        "`optimizer.min_lr` is 1e-06: has no effect with schedule constant",
    ),
    "min_lr over lr": (
        ("optimizer.min_lr=1e-3", "optimizer.schedule=cosine"),
        {},
        "`optimizer.min_lr` is 0.001: greater than `optimizer.lr` 2e-05",
    ),
    "fp8 attention": (
        ("precision.fp8_attention=true",),
        {},
        "`precision.fp8_attention` is true: has no effect without `precision.fp8`",
    ),
    "fp8 without a GPU": (("precision.fp8=hybrid",), {}, "`precision.fp8` is 'hybrid': needs a GPU"),
    "teacher of no use": (
        (
            *ALONE,
            "objectives.short_restoration=null",
            "data.short=null",
            "teacher.hf=/t",
        ),
        {},
        "`teacher.hf` is /t: has no effect, since no objective compares with a teacher",
    ),
    "packed over the teacher's window": (
        (f"{PACKED}={{microbatches: 8, sequence_length: 32768, data: short}}",),
        {},
        "`objectives.packed_distillation.sequence_length` is 32768: longer than the teacher's window of 8192 tokens",
    ),
    "top_k of the whole vocabulary": (
        (f"{PACKED}={{microbatches: 8, sequence_length: 8192, data: short, top_k: 128256}}",),
        {},
        "`objectives.packed_distillation.top_k` is 128256: has no effect, model.hf has 128256 tokens",
    ),
    "temperature without a teacher": (
        (f"{PACKED}={{microbatches: 8, sequence_length: 8192, data: short, cross_entropy: 1, temperature: 2.0}}",),
        {},
        "`objectives.packed_distillation.temperature` is 2.0: has no effect, since cross_entropy is 1",
    ),
    "masked documents in FP8": (
        (
            f"{PACKED}={{microbatches: 8, sequence_length: 8192, data: short, mask_documents: true}}",
            "precision={fp8: hybrid, fp8_attention: true}",
        ),
        {"gpu": True},
        "`objectives.packed_distillation.mask_documents` is true: Transformer Engine's FP8 attention",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problem(check: Check, case: str) -> None:
    overrides, arguments, expected = CASES[case]
    (problem,) = check(*overrides, **arguments)
    assert problem.startswith(expected)


def test_sequence_parallel_cuts_the_tokens_of_a_context_rank(check: Check) -> None:
    changes = ("parallel={tensor: 8, sequence: true}", "step.tokens_per_microbatch=4", *ALONE)
    lengths = ("objectives.long_text.sequence_length=4", "objectives.short_restoration.sequence_length=4")
    (problem,) = check(*changes, *lengths, world_size=8)
    assert problem.startswith("`step.tokens_per_microbatch` is 4: must be a multiple of context x tensor = 1 x 8")
    assert problem.endswith("nearest: 8")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 2048}, "with hidden_size 2048: must be the 4096 of model.hf"),
        ({"vocab_size": 32000}, "with vocab_size 32000: must be the 128256 of model.hf"),
        ({"num_layers": 16}, "with num_layers 16: must be the 32 of model.hf"),
    ],
)
def test_teacher_of_another_shape(
    check: Check, architecture: Architecture, change: dict[str, Any], expected: str
) -> None:
    (problem,) = check("teacher.hf=/t", teacher=replace(architecture, **change))
    assert problem.startswith("`teacher.hf` is /t ")
    assert expected in problem


def test_a_teacher_of_another_depth_is_split_by_its_own(check: Check, architecture: Architecture) -> None:
    """It may be compared with at the last layer, if every stage gets a layer of it."""
    change = ("objectives.short_restoration=null", "data.short=null", "teacher.hf=/t")
    teacher = replace(architecture, num_layers=15)
    overrides = (*change, "parallel.pipeline=2", "objectives.long_text.microbatches=6")
    assert check(*change, teacher=teacher) == []
    assert check(*overrides, teacher=teacher, world_size=2) == []
    (problem,) = check(*overrides, teacher=replace(teacher, num_layers=1), world_size=2)
    assert "2: more than the 1 layers of teacher.hf; use 1 or less" in problem


def test_window_of_the_teacher_counts(check: Check, architecture: Architecture) -> None:
    change = ("teacher.hf=/t", "objectives.short_restoration.sequence_length=16384")
    assert check(*change, teacher=replace(architecture, max_position_embeddings=16384)) == []


def test_problems_come_all_at_once(check: Check) -> None:
    problems = check(
        "model.rope.theta=1",
        "parallel.tensor=3",
        "objectives.short_restoration.layers=[40]",
        "optimizer.min_lr=1",
    )
    assert len(problems) == 6  # two about the world and the learning rate follow from these


def test_similar_data_set_is_suggested(check: Check) -> None:
    assert any("did you mean 'window'?" in problem for problem in check("objectives.short_to_long.data=windw"))


def test_fp8_asks_this_machine(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check("precision.fp8=hybrid", gpu=None) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(check("precision.fp8=hybrid", gpu=None)) == 1


def test_rope_extension(write: Write, values: dict[str, Any], architecture: Architecture) -> None:
    path = write(values)
    abf = rope_extension(load_recipe(path), architecture)
    assert abf == {"method": "abf", "theta": 2e7, "original_window": 8192}
    pi = rope_extension(load_recipe(path, ["model.rope={method: pi}"]), architecture)
    assert pi == {"method": "pi", "factor": 4.0, "original_window": 8192}
    given = rope_extension(load_recipe(path, ["model.rope={method: yarn, factor: 8}"]), architecture)
    assert given["factor"] == 8.0
    assert (given["beta_fast"], given["beta_slow"], given["attention_factor"]) == (32.0, 1.0, None)


@pytest.mark.parametrize("method", ["{method: abf, theta: 2e7}", "{method: pi}", "{method: yarn}", "none"])
def test_rope_extension_is_what_extended_rope_takes(
    write: Write, values: dict[str, Any], architecture: Architecture, method: str
) -> None:
    from longred_megatron.rope.scaling import extended_rope

    recipe = load_recipe(write(values), [f"model.rope={method}"])
    rope = extended_rope(architecture.rope, **rope_extension(recipe, architecture))
    assert (rope == architecture.rope) == (method == "none")


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    tensor=st.integers(1, 9),
    pipeline=st.integers(1, 9),
    context=st.integers(1, 9),
    replicas=st.integers(1, 9),
)
def test_suggested_layouts_are_valid(check: Check, tensor: int, pipeline: int, context: int, replicas: int) -> None:
    """A layout passes exactly when everything can be dealt out evenly."""
    layout = f"parallel={{tensor: {tensor}, pipeline: {pipeline}, context: {context}}}"
    problems = check(layout, world_size=tensor * pipeline * context * replicas)
    divides = 8 % tensor == 0 and 32 % pipeline == 0 and 16 % replicas == 0 and 8 % context == 0
    assert (problems == []) == divides


@given(value=st.integers(1, 10**6), of=st.integers(1, 10**4))
def test_nearest_multiples(value: int, of: int) -> None:
    nearest = [int(text) for text in _multiples(value, of).split(", ")]
    assert all(number > 0 and number % of == 0 and abs(number - value) < max(of, 2) for number in nearest)


def test_nearest_divisors() -> None:
    assert _divisors(32, 6) == "4, 8"
    assert _divisors(8, 16) == "8"
    assert _divisors(7, 3) == "1, 7"
