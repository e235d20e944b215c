from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longred_megatron.errors import multiples
from longred_megatron.families import Architecture
from longred_megatron.objectives.base import Layers, Needs, Objective, Site, Tap
from longred_megatron.precision import HOPPER, Card
from longred_megatron.recipe import checks, load_recipe
from longred_megatron.recipe.checks import _divisors, check_phase
from longred_megatron.rope import RopeSource
from tests.recipe.conftest import phase_of

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
        return check_phase(phase_of(recipe, replace(architecture, **changes), teacher), world_size, gpu=gpu)

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


PACKED, PERTURBED = "objectives.packed_distillation", "objectives.perturbed_positions"
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
    "not the family's rope": (
        ("model.rope={method: yarn}",),
        {"family": "phi3"},
        "`model.rope.method` is 'yarn': transformers does not read yarn RoPE in a phi3 model",
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
    "dynamic without a longer window": (
        (
            "model.rope=dynamic",
            "model.max_position_embeddings=8192",
            "objectives.long_text.sequence_length=8192",
            *ALONE,
        ),
        {},
        "`model.rope.method` is 'dynamic': has no effect: the base grows past the 8192 positions of model.hf",
    ),
    "longrope for other heads": (
        (f"model.rope={{method: longrope, short_factor: {[1.0] * 64}, long_factor: [1, 2]}}",),
        {},
        "`model.rope.long_factor` has 2 entries: must have 64, one for each rotated pair of the 128 dims of a head",
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
        "`objectives.long_text.data` is 'lnog': no such data set; `data` has window, short",
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
    "tensor overlap without a GPU": (
        ("parallel.tp_comm_overlap=true", "parallel.tensor=2", "parallel.sequence=true"),
        {"world_size": 2},
        "`parallel.tp_comm_overlap` is true: needs a GPU, and none is used; set it to false",
    ),
    "tensor overlap of whole tokens": (
        ("parallel.tp_comm_overlap=true", "parallel.tensor=2"),
        {"world_size": 2, "gpu": True},
        "`parallel.tp_comm_overlap` is true: needs `parallel.sequence`: true; set that, or this to false",
    ),
    "tensor overlap with FP8": (
        ("parallel.tp_comm_overlap=true", "parallel.tensor=2", "parallel.sequence=true", "precision.fp8=hybrid"),
        {"world_size": 2, "gpu": True},
        "`parallel.tp_comm_overlap` is true: its buffers are for bf16, and `precision.fp8` is 'hybrid'; set one of "
        "them off",
    ),
    "context and zig-zag": (
        ("parallel.context=2", "objectives.long_text.sequence_length=2", "step.tokens_per_microbatch=65536"),
        {"world_size": 2},
        "`objectives.long_text.sequence_length` is 2: must be a multiple of 2 x `parallel.context` = 4, as "
        "each rank takes two equal pieces; nearest: 4, or set whole_sequences: true",
    ),
    "context and whole sequences": (
        ("parallel.context=16",),
        {"world_size": 16},
        "`objectives.short_to_long.whole_sequences` is true: the 8 sequences of a micro-batch must be a "
        "multiple of `parallel.context` 16; set `step.tokens_per_microbatch` to a multiple of 131072 "
        "(nearest: 131072)",
    ),
    "old name: part of the context axis": (
        ("parallel.context=4", "objectives.long_text.context_parallel=2"),
        {"world_size": 4},
        "`objectives.long_text.context_parallel` is 2: must be 1 or `parallel.context` 4",
    ),
    "old name: without the axis": (
        ("objectives.long_text.context_parallel=2",),
        {},
        "`objectives.long_text.context_parallel` is 2: must be 1",
    ),
    "old name: whole sequences": (
        ("parallel.context=2", "objectives.long_text.context_parallel=1", "step.tokens_per_microbatch=98304"),
        {"world_size": 2},
        "`objectives.long_text.whole_sequences` is true: the 3 sequences of a micro-batch must be a multiple of "
        "`parallel.context` 2; set `step.tokens_per_microbatch` to a multiple of 65536 (nearest: 65536, 131072)",
    ),
    "chunks that are no split of the layers": (
        ("parallel={pipeline: 2, layers_per_chunk: [16, 15]}",),
        {"world_size": 2},
        "`parallel.layers_per_chunk` is [16, 15]: must be 2 numbers, one for each of pipeline x virtual_pipeline = "
        "2 x 1 chunks, that add up to the 32 layers of model.hf, for instance [16, 16]",
    ),
    "old name: chunks without a pipeline": (
        ("parallel.layers_per_stage=[32]",),
        {},
        "`parallel.layers_per_chunk` is [32]: has no effect at `parallel.pipeline` 1; set it to null",
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
    "fp8 widths on a rank": (
        ("precision={fp8: hybrid, fp8_recipe: mxfp8}", "parallel.tensor=8"),
        {"gpu": True, "world_size": 8, "intermediate_size": 14464},
        "`precision.fp8` is 'hybrid': intermediate_size of model.hf is 1808 on a rank, and FP8 products (mxfp8) take",
    ),
    "fp8 heads": (
        ("precision={fp8: hybrid, fp8_attention: true}",),
        {"gpu": True, "head_dim": 64},
        "`precision.fp8_attention` is true: to train on Hopper, heads must have 128 dims, those of model.hf have 64",
    ),
    "fp8 teacher without one": (
        ("precision={fp8: hybrid, teacher_fp8: true}", *ALONE, "objectives.short_restoration=null", "data.short=null"),
        {"gpu": True},
        "`precision.teacher_fp8` is true: has no effect, since no objective compares with a teacher",
    ),
    "delayed scales of a natural view": (
        (
            f"{PERTURBED}={{microbatches: 8, sequence_length: 8192, data: window, whole_sequences: true}}",
            "precision={fp8: hybrid, fp8_recipe: delayed}",
        ),
        {"gpu": True},
        "`objectives.perturbed_positions` runs the student without gradients before it trains: with delayed scaling",
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
        "`teacher.hf` is /t: has no effect, since no objective compares with it",
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
    "longest skip of ids that go round": (
        (f"{PERTURBED}={{microbatches: 8, sequence_length: 8192, data: short, variant: cyclic, longest_skip: 64}}",),
        {},
        "`objectives.perturbed_positions.longest_skip` is 64: has no effect with variant cyclic; leave it out",
    ),
    "nothing to perturb": (
        (f"{PERTURBED}={{microbatches: 8, sequence_length: 1, data: short}}",),
        {},
        "`objectives.perturbed_positions.sequence_length` is 1: a text needs at least 2 tokens to be perturbed",
    ),
    "masked texts in FP8": (
        ("objectives.long_text.mask_documents=true", "precision={fp8: hybrid, fp8_attention: true}"),
        {"gpu": True},
        "`objectives.long_text.mask_documents` is true: Transformer Engine's FP8 attention",
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


@pytest.mark.parametrize("ranks", [1, 4, "null"])
def test_old_values_of_context_parallel_without_problem(check: Check, ranks: int | str) -> None:
    changes = ("step.tokens_per_microbatch=131072", f"objectives.long_text.context_parallel={ranks}")
    assert check(*changes, "parallel.context=4", world_size=4) == []


def test_sequence_parallel_cuts_the_tokens_of_a_context_rank(check: Check) -> None:
    changes = ("parallel={tensor: 8, sequence: true}", "step.tokens_per_microbatch=4", *ALONE)
    lengths = ("objectives.long_text.sequence_length=4", "objectives.short_restoration.sequence_length=4")
    (problem,) = check(*changes, *lengths, world_size=8)
    assert problem.startswith("`step.tokens_per_microbatch` is 4: must be a multiple of context x tensor = 1 x 8")
    assert problem.endswith("nearest: 8")


BOTH = ("short_to_long", "short_restoration")


@pytest.mark.parametrize(
    ("change", "objectives", "compared", "sizes"),
    [
        ({"hidden_size": 2048}, BOTH, "hidden states", "hidden_size 2048, model.hf 4096"),
        ({"vocab_size": 32000}, BOTH, "token ids", "vocab_size 32000, model.hf 128256"),
        ({"num_layers": 48}, BOTH[1:], "layers", "num_layers 48, model.hf 32"),
    ],
)
def test_teacher_of_another_shape(
    check: Check,
    architecture: Architecture,
    change: dict[str, Any],
    objectives: tuple[str, ...],
    compared: str,
    sizes: str,
) -> None:
    assert check("teacher.hf=/t", teacher=replace(architecture, **change)) == [
        f"`objectives.{name}` compares {compared} one to one: its teacher has {sizes}; choose a teacher of that size"
        for name in objectives
    ]


@pytest.mark.parametrize(
    ("change", "compared"),
    [
        ({"num_attention_heads": 16}, "heads"),
        ({"num_kv_heads": 4}, "key/value heads"),
        ({"num_layers": 48}, "layers"),
        ({"vocab_size": 32000}, "token ids"),
    ],
)
def test_a_teacher_of_relations_has_as_many_of_each(
    check: Check, architecture: Architecture, change: dict[str, int], compared: str
) -> None:
    mine = "{kind: relations, microbatches: 8, sequence_length: 1024, data: short, layers: [2], teacher: {hf: /t}}"
    [(attribute, number)] = change.items()
    assert check(f"objectives.mine={mine}", teacher=replace(architecture, hidden_size=2048)) == []
    assert check(f"objectives.mine={mine}", teacher=replace(architecture, **change)) == [
        f"`objectives.mine` compares {compared} one to one: its teacher has {attribute} {number}, model.hf "
        f"{getattr(architecture, attribute)}; choose a teacher of that size"
    ]


def test_a_teacher_of_another_depth_is_split_by_its_own(check: Check, architecture: Architecture) -> None:
    """It may be compared with at the last layer, if every stage gets a layer of it."""
    change = ("objectives.short_restoration=null", "data.short=null", "teacher.hf=/t")
    teacher = replace(architecture, num_layers=15)
    overrides = (*change, "parallel.pipeline=2", "objectives.long_text.microbatches=6")
    assert check(*change, teacher=teacher) == []
    assert check(*overrides, teacher=teacher, world_size=2) == []
    (problem,) = check(*overrides, teacher=replace(teacher, num_layers=1), world_size=2)
    assert "2: more than the 1 layers of teacher /t; use 1 or less" in problem


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (
            "{kind: next_token, microbatches: 8, sequence_length: 1024, data: short, teacher: {hf: /own}}",
            "`objectives.mine.teacher` has no effect: it compares with none; remove it",
        ),
        (
            "{kind: packed_distillation, microbatches: 8, sequence_length: 1024, data: short, cross_entropy: 1, "
            "teacher: {hf: /own}}",
            "`objectives.mine.teacher` has no effect: it compares with none; remove it",
        ),
        (
            "{kind: perturbed_positions, microbatches: 8, sequence_length: 1024, data: short, teacher: {hf: /own}}",
            "`objectives.mine.teacher` has no effect: the student is its own; remove it",
        ),
    ],
)
def test_a_teacher_without_effect(check: Check, kind: str, problem: str) -> None:
    assert check(f"objectives.mine={kind}") == [problem]


def test_the_recipes_teacher_has_no_effect_where_each_objective_has_its_own(check: Check) -> None:
    own = [f"objectives.{name}.teacher.hf=/own" for name in BOTH]
    assert check(*own) == [] and check(own[0], "teacher.hf=/t") == []
    (problem,) = check(*own, "teacher.hf=/t")
    assert problem.startswith("`teacher.hf` is /t: has no effect, since no objective compares with it")


def test_sizes_and_window_are_of_the_objectives_own_teacher(check: Check, architecture: Architecture) -> None:
    small = replace(architecture, hidden_size=2048, max_position_embeddings=4096)
    found = check("objectives.short_to_long.teacher.hf=/own", teacher=small)
    assert [problem.split(" is ")[0].split(" compares ")[0] for problem in found] == [
        "`objectives.short_to_long.sequence_length`",
        "`objectives.short_to_long`",
    ]


def test_cuts_of_every_teacher_are_checked(check: Check, architecture: Architecture) -> None:
    teacher = replace(architecture, num_layers=15, num_kv_heads=3)
    own = ("objectives.short_to_long.teacher.hf=/own", "objectives.short_restoration.teacher.hf=/another")
    found = check(*own, "parallel={pipeline: 16, tensor: 2}", world_size=32, teacher=teacher)
    ours = [problem for problem in found if problem.startswith("`parallel.")]
    assert len(ours) == 4
    for folder in ("/own", "/another"):
        assert any("`parallel.tensor` is 2: must divide" in p and f"units of teacher {folder};" in p for p in ours)
        assert any(f"more than the 15 layers of teacher {folder}; use 15 or less" in p for p in ours)


# What `objectives/base.py` checks of any kind


class Compared(Objective):
    """Compares chosen layers of the student with others of its teacher; checks nothing itself."""

    kind: Literal["compared"] = "compared"
    pairs: dict[int, int]
    is_itself: bool = False

    def needs(self, site: Site) -> Needs:
        pairs = {Tap(ours): Tap(theirs) for ours, theirs in self.pairs.items()}
        return Needs(pairs=pairs, teacher_is_student=self.is_itself)


@pytest.fixture
def compare(write: Write, values: dict[str, Any], architecture: Architecture) -> Callable[..., list[str]]:
    """Problems of layers compared, {the student's: the teacher's}, in a layout."""

    def compare(
        pairs: dict[int, int],
        layout: str = "{}",
        depth: int = 32,
        kind: type[Compared] = Compared,
        **settings: Any,
    ) -> list[str]:
        recipe = load_recipe(write(values), [f"parallel={layout}"])
        teacher = replace(architecture, num_layers=depth)
        site = replace(phase_of(recipe, architecture).sites["short_to_long"], teacher=teacher)
        own = {"microbatches": 1, "sequence_length": 8192, "data": "short", "pairs": pairs}
        return list(kind.model_validate(own | settings).problems("objectives.mine", site))

    return compare


@pytest.mark.parametrize(
    ("layout", "pairs", "depth", "stages"),
    [
        ("{pipeline: 2}", {16: 17}, 32, (0, 1)),
        ("{pipeline: 2}", {1: 1, 32: 16}, 32, (1, 0)),
        ("{pipeline: 2}", {32: 8}, 16, (1, 0)),
        ("{pipeline: 2}", {16: 8}, 15, (0, 1)),  # stages of 7 and 8 layers
        ("{pipeline: 4}", {9: 8}, 32, (1, 0)),
        ("{pipeline: 2, virtual_pipeline: 2}", {8: 9}, 32, (0, 1)),
        ("{pipeline: 2, layers_per_chunk: [20, 12]}", {20: 21}, 32, (0, 1)),
        ("{pipeline: 2, layers_per_chunk: [20, 12]}", {20: 9}, 16, (0, 1)),  # a teacher has its own split
    ],
)
def test_values_on_two_stages_cannot_be_compared(
    compare: Callable[..., list[str]], layout: str, pairs: dict[int, int], depth: int, stages: tuple[int, int]
) -> None:
    (ours, theirs), *_ = list(pairs.items())[::-1]
    assert compare(pairs, layout, depth) == [
        f"`objectives.mine` compares layer {ours} of model.hf with layer {theirs} of its teacher: they lie on the "
        f"pipeline stages {stages[0]} and {stages[1]} (from 0) and must lie on one; change `parallel`"
    ]


@pytest.mark.parametrize(
    ("layout", "pairs", "depth"),
    [
        ("{}", {1: 32}, 32),
        ("{pipeline: 2}", {16: 1, 17: 32}, 32),
        ("{pipeline: 2}", {16: 8, 32: 16}, 16),
        ("{pipeline: 2}", {16: 7, 17: 8}, 15),
        ("{pipeline: 2, virtual_pipeline: 2}", {1: 17, 32: 9}, 32),  # two chunks of a stage
        ("{pipeline: 2, layers_per_chunk: [20, 12]}", {20: 8, 21: 9}, 16),
    ],
)
def test_values_on_one_stage_can_be_compared(
    compare: Callable[..., list[str]], layout: str, pairs: dict[int, int], depth: int
) -> None:
    assert compare(pairs, layout, depth) == []


def test_two_pairs_on_two_stages_are_one_problem(compare: Callable[..., list[str]]) -> None:
    assert len(compare({15: 17, 16: 18}, "{pipeline: 2}")) == 1


@pytest.mark.parametrize("layout", ["{}", "{pipeline: 2}"])
def test_layers_that_a_model_does_not_have(compare: Callable[..., list[str]], layout: str) -> None:
    assert compare({0: 1, 33: 16, 35: 17, 2: 2}, layout, depth=16) == [
        "`objectives.mine` needs the layers 0, 33, 35 of model.hf, which has 1 to 32",
        "`objectives.mine` needs the layers 17 of its teacher, which has 1 to 16",
    ]


def test_layers_that_a_key_names_are_told_once(compare: Callable[..., list[str]]) -> None:
    """A key marked as layers is checked by its name; the tap that comes of it is not another problem."""

    class Named(Compared):
        layers: Layers = (33, 2)

    assert compare({33: 33, 2: 2}, kind=Named) == [
        "`objectives.mine.layers` holds 33: the layers of model.hf are 1 to 32",
        "`objectives.mine.layers` is [33, 2]: is not in ascending order; write [2]",
    ]
    assert compare({33: 33, 34: 2}, kind=Named)[-1].startswith("`objectives.mine` needs the layers 34 of model.hf")
    # Layers that the student has and the teacher has not are no problem of the key.
    assert compare({20: 20, 2: 2}, depth=16, kind=Named, layers=(2, 20)) == [
        "`objectives.mine` needs the layers 20 of its teacher, which has 1 to 16"
    ]


def test_a_student_that_is_its_own_teacher_has_no_other(compare: Callable[..., list[str]]) -> None:
    teacher = {"hf": Path("/t")}
    assert compare({32: 32}, teacher=teacher) == compare({32: 32}, is_itself=True) == []
    assert compare({32: 32}, is_itself=True, teacher=teacher) == [
        "`objectives.mine.teacher` has no effect: the student is its own; remove it"
    ]
    assert compare({}, teacher=teacher) == ["`objectives.mine.teacher` has no effect: it compares with none; remove it"]


def test_the_window_of_a_teacher_counts_only_where_there_is_one(compare: Callable[..., list[str]]) -> None:
    long = {"sequence_length": 16384}
    (problem,) = compare({32: 32}, **long)
    assert problem.startswith("`objectives.mine.sequence_length` is 16384: longer than the teacher's window of 8192")
    assert compare({}, **long) == compare({32: 32}, is_itself=True, **long) == []


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
    monkeypatch.setattr(Card, "here", lambda: HOPPER)
    monkeypatch.setattr(checks, "on_gpu", lambda: True)
    assert check("precision.fp8=hybrid", gpu=None) == []
    assert len(check("precision={fp8: hybrid, fp8_recipe: mxfp8}", gpu=None)) == 1
    monkeypatch.setattr(checks, "on_gpu", lambda: False)
    assert len(check("precision.fp8=hybrid", gpu=None)) == 1


def test_fp32_has_no_fused_attention_on_a_gpu(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("precision.params=fp32", gpu=None) == check("precision.params=fp32", gpu=True) == []  # a rehearsal
    monkeypatch.setattr(checks, "on_gpu", lambda: True)
    [problem] = check("precision.params=fp32", gpu=None)
    assert problem.startswith("`precision.params` is 'fp32': there is no fused attention for it on a GPU")


def test_what_the_rope_method_knows(write: Write, values: dict[str, Any], architecture: Architecture) -> None:
    path = write(values)
    source = phase_of(load_recipe(path), architecture).rope_source
    assert source == RopeSource(architecture.rope, head_dim=128, original_window=8192, target_window=32768)
    abf = load_recipe(path).model.rope.extended(source)
    assert abf == {"rope_type": "default", "rope_theta": 2e7}
    pi = load_recipe(path, ["model.rope={method: pi}"]).model.rope.extended(source)
    assert pi == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    given = load_recipe(path, ["model.rope={method: yarn, factor: 8}"]).model.rope.extended(source)
    assert given["factor"] == 8.0 and given["original_max_position_embeddings"] == 8192
    assert (given["beta_fast"], given["beta_slow"]) == (32.0, 1.0) and "attention_factor" not in given


@pytest.mark.parametrize("method", ["{method: abf, theta: 2e7}", "{method: pi}", "yarn", "dynamic", "none"])
def test_every_method_but_none_changes_rope(
    write: Write, values: dict[str, Any], architecture: Architecture, method: str
) -> None:
    recipe = load_recipe(write(values), [f"model.rope={method}"])
    rope = recipe.model.rope.extended(phase_of(recipe, architecture).rope_source)
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
    nearest = [int(text) for text in multiples(value, of).split(", ")]
    assert all(number > 0 and number % of == 0 and abs(number - value) < max(of, 2) for number in nearest)


def test_nearest_divisors() -> None:
    assert _divisors(32, 6) == "4, 8"
    assert _divisors(8, 16) == "8"
    assert _divisors(7, 3) == "1, 7"
