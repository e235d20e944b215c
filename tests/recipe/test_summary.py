import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.families import Architecture
from longred_megatron.planning.flops import step_flops
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import FUSED
from longred_megatron.planning.plan import GIB, plan_phase
from longred_megatron.planning.saving import checkpoint_bytes
from longred_megatron.planning.summary import phases_summary
from longred_megatron.recipe import Phase, load_recipe
from tests.recipe.conftest import phase_of

Write = Callable[..., Path]
NO_TEACHER = r"not computed +the teacher \(no objective compares with it\)$"


@pytest.fixture
def summarise(write: Write, values: dict[str, Any], architecture: Architecture) -> Callable[..., str]:
    def summarise(*overrides: str, world_size: int = 1) -> str:
        recipe = load_recipe(write(values), overrides)
        return phases_summary([phase_of(recipe, architecture)], world_size, gpu=True)

    return summarise


def test_arithmetic_of_the_published_step(summarise: Callable[..., str]) -> None:
    """LongReD's 32K step (PAPERS: 16 x 131,072 tokens; 0.5 CE + 1.25 s2l + 1.875 restoration)."""
    text = summarise("step.tokens_per_microbatch=131072", "parallel={tensor: 2, context: 2}", world_size=8)
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines() if not line.startswith(" ")}
    assert "8 = tensor 2 x pipeline 1 x context 2 x data 2" in lines["world"]
    assert "16 a step = 8 on each of 2 replicas; 131,072 tokens each, 65,536 on a rank" in lines["micro-batches"]
    assert lines["tokens a step"].endswith(" 2,097,152")
    assert "1,073,741,824 = 512 steps x 2,097,152" in lines["tokens in all"]
    assert "0.5 long_text + 1.25 short_to_long + 1.875 short_restoration (3 layers)" in lines["step loss"]
    assert lines["parameters"].endswith(" 8,030,261,248")
    assert "8,192 -> 32,768 tokens, rope abf, theta 2e+07" in lines["window"]
    assert "1,048,576 (50.0%): 32 x 32,768" in text
    assert "262,144 (12.5%): 32 x 8,192" in text
    assert "786,432 (37.5%): 768 x 1,024" in text


def test_lists_of_a_rope_are_counted(summarise: Callable[..., str]) -> None:
    factors = f"short_factor: {[1.0] * 64}, long_factor: {[2.0] * 64}"
    text = summarise(f"model.rope={{method: longrope, {factors}, attention_factor: 1.25}}")
    assert "rope longrope, short_factor of 64 numbers, long_factor of 64 numbers, attention_factor 1.25" in text


def test_what_is_skipped(summarise: Callable[..., str]) -> None:
    assert summarise().endswith(
        "the teacher on long_text; the teacher's head; the model's head on short_to_long, short_restoration"
    )
    shallow = summarise("objectives.short_to_long=null", "objectives.short_restoration.layers=[1, 9]")
    assert "the teacher's layers 10 to 32; the teacher's head" in shallow
    alone = summarise("objectives.short_to_long=null", "objectives.short_restoration=null")
    assert re.search(NO_TEACHER, alone)


def test_the_copy_of_a_checkpoint_is_told_where_one_is_made(
    summarise: Callable[..., str], write: Write, values: dict[str, Any], architecture: Architecture
) -> None:
    text = summarise("training.async_save=true", "parallel.context=2", world_size=4)
    # bf16 weights, and in fp32 the weights again and two moments, of which four ranks write a quarter each.
    expected = (2 + 12) * architecture.num_parameters() / 4
    [told] = [line for line in text.splitlines() if line.startswith("checkpoint copy")]
    assert f"about {expected / GIB:.2f} GiB a rank of the machine's memory" in told
    assert "checkpoint copy" not in summarise()
    frozen = phase_of(load_recipe(write(values), ["training.trainable=[attention]"]), architecture)
    trained = architecture.num_layers * architecture.layer_parameters(["attention"])
    assert checkpoint_bytes(frozen, 1) == pytest.approx(2 * architecture.num_parameters() + 12 * trained, rel=1e-3)


SHORT = "microbatches: 4, sequence_length: 1024, data: short"


@pytest.fixture
def two_teachers(write: Write, values: dict[str, Any], architecture: Architecture) -> Phase:
    """short_to_long compares with /large, of 40 layers of the same size; short_restoration with model.hf."""
    own = ("objectives.short_to_long.teacher.hf=/large", "objectives.short_restoration.layers=[1, 9]")
    recipe = load_recipe(write(values), own)
    return phase_of(recipe, architecture, replace(architecture, num_layers=40))


def test_what_is_skipped_of_two_teachers(two_teachers: Phase) -> None:
    model = two_teachers.recipe.model.hf
    assert phases_summary([two_teachers], 1, gpu=True).partition("not computed")[2].strip() == (
        f"the teacher on long_text; teacher /large's head; teacher {model}'s layers 10 to 32; teacher {model}'s head; "
        "the model's head on short_to_long, short_restoration"
    )


def test_two_teachers_are_both_in_memory(two_teachers: Phase, architecture: Architecture) -> None:
    layer, embedding = architecture.layer_parameters(), architecture.vocab_size * architecture.hidden_size
    expected = 2 * ((40 * layer + embedding) + (9 * layer + embedding))
    assert f"{expected / GIB:.2f} GiB (forward only" in phases_summary([two_teachers], 1, gpu=True)


def test_each_stage_has_its_layers_of_both_models(
    write: Write, values: dict[str, Any], architecture: Architecture
) -> None:
    """20 layers of one teacher and 16 of the other and of the student, each stage with a table."""
    own = ("objectives.short_to_long.teacher.hf=/large", "parallel.pipeline=2", "parallel.tensor=2")
    phase = phase_of(load_recipe(write(values), own), architecture, replace(architecture, num_layers=40))
    layer, embedding = architecture.layer_parameters(), architecture.vocab_size * architecture.hidden_size
    parts = StageMemory(phase, 8, 0, FUSED).resident
    trained = (16 * layer + embedding) / 2
    of_student = {"weights": 2 * trained, "gradients": 4 * trained, "optimizer": 12 * trained / 2}
    of_teachers = ((20 + 16) * layer + 2 * embedding) / 2
    assert parts == pytest.approx(
        of_student | {"teacher": 2 * of_teachers, "fp8 weights": 0}, rel=1e-3
    )  # norms are not halved


def test_memory_is_that_of_the_plan(
    write: Write, values: dict[str, Any], architecture: Architecture, summarise: Callable[..., str]
) -> None:
    shape = ["parallel.pipeline=2", "training.recompute=full"]
    plan = plan_phase(phase_of(load_recipe(write(values), shape), architecture), 2, read_gpu("h100-80gb"))
    peak, text = plan.fullest.peak, summarise(*shape, world_size=2)
    assert f"{peak.total / GIB:.2f} GiB at the fullest, stage {plan.fullest.stage}, {peak.moment}" in text
    for part, size in peak.parts.items():
        assert not size or re.search(rf"  {part} +{size / GIB:.2f} GiB", text), part
    on_cpu = phases_summary([plan.phase], 2, gpu=False)
    assert "a process and its libraries" in on_cpu and on_cpu != text


PERTURBED = f"objectives.perturbed_positions={{{SHORT}}}"


def test_a_student_that_is_its_own_teacher(
    write: Write, values: dict[str, Any], architecture: Architecture, summarise: Callable[..., str]
) -> None:
    alone = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null")
    assert re.search(NO_TEACHER, summarise(*alone, PERTURBED))
    beside = summarise(PERTURBED, "objectives.short_to_long=null", "objectives.short_restoration.layers=[1, 9]")
    assert beside.endswith(
        "the teacher on long_text, perturbed_positions; the teacher's layers 10 to 32; the teacher's head; the model's "
        "head on short_restoration"
    )
    # No second model, whatever that of others is: its values are those of the student's last layer.
    packed = f"objectives.packed_distillation={{{SHORT}, teacher: {{hf: /wide}}}}"
    wide = replace(architecture, num_layers=40, hidden_size=8192)
    own = phase_of(load_recipe(write(values), [*alone, PERTURBED]), architecture)
    assert StageMemory(own, 1, 0, FUSED).resident["teacher"] == 0
    for teacher in ([packed], [packed.replace(", teacher: {hf: /wide}", ""), "teacher.hf=/wide"]):
        phase = phase_of(load_recipe(write(values), [*alone, PERTURBED, *teacher]), architecture, wide)
        assert phase.sites["perturbed_positions"].teacher == architecture
        passes = ((3, architecture, 32), (1, wide, 40))  # of the packed texts: forward and backward, the teacher's
        packs = sum(times * model.forward_flops_per_token(depth, 1024, True) for times, model, depth in passes)
        assert step_flops(phase) - step_flops(own) == pytest.approx(4 * 65536 * packs)


def test_relations(summarise: Callable[..., str]) -> None:
    alone = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null")
    relations = f"objectives.mine={{kind: relations, {SHORT}, layers: [1, 5, 17], weight: 0.5}}"
    text = summarise(*alone, relations)
    assert "0.5 mine (3 layers)   (weight x micro-batches / 4)" in text
    assert text.endswith("the teacher's layers 18 to 32; the teacher's head; the model's head on mine")


def test_fp8_is_told(write: Callable[..., Path], values: dict[str, Any], architecture: Architecture) -> None:
    def lines(precision: str) -> str:
        recipe = load_recipe(write(values), [f"precision={precision}"])
        return phases_summary([phase_of(recipe, architecture)], 1, gpu=True)

    assert "FP8" not in lines("{fp8: null}")
    assert "hybrid, tensorwise scaling: student; teachers in bf16" in lines("{fp8: hybrid}")
    told = lines("{fp8: hybrid, fp8_attention: true, teacher_fp8: false}")
    assert "hybrid, delayed scaling" in told and "issue 3248" in told
