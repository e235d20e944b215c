import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.families import Architecture
from longred_megatron.kernels.relation_divergence import BLOCK_BYTES
from longred_megatron.recipe import Phase, load_recipe, phases_summary
from longred_megatron.recipe.summary import GIB, Memory, _stages, checkpoint_bytes, expected_memory
from longred_megatron.training.flops import step_flops
from tests.recipe.conftest import phase_of

Write = Callable[..., Path]


@pytest.fixture
def summarise(write: Write, values: dict[str, Any], architecture: Architecture) -> Callable[..., str]:
    def summarise(*overrides: str, world_size: int = 1) -> str:
        recipe = load_recipe(write(values), overrides)
        return phases_summary([phase_of(recipe, architecture)], world_size)

    return summarise


@pytest.fixture
def memory(write: Write, values: dict[str, Any], architecture: Architecture) -> Callable[..., Memory]:
    def memory(*overrides: str, world_size: int = 1, **changes: Any) -> Memory:
        model = replace(architecture, **changes)
        return expected_memory(phase_of(load_recipe(write(values), overrides), model), world_size)

    return memory


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
    assert alone.endswith("not computed       the teacher (no objective compares with it)")


def test_memory_of_one_rank_is_that_of_the_whole_model(
    memory: Callable[..., Memory], architecture: Architecture
) -> None:
    one = memory()
    number = architecture.num_parameters()
    embedding = architecture.vocab_size * architecture.hidden_size
    # The final norm's 4,096 weights are left out.
    assert math.isclose(one.parameters, 2 * number, rel_tol=1e-5)
    assert math.isclose(one.gradients, 4 * number, rel_tol=1e-5)
    assert math.isclose(one.optimizer, 12 * number, rel_tol=1e-5)
    assert math.isclose(one.teacher, 2 * (number - embedding), rel_tol=1e-5)
    # 6 micro-batches x 3 layers and 2 x the last one, 65,536 tokens x 4,096 in bf16
    assert one.teacher_targets == 3 * 65536 * 4096 * 2  # of one micro-batch, the largest
    # An input a layer, and one working set: 4 h + 2 queries + 2 (keys + values) + 3 feed-forward widths
    assert one.activations == 65536 * 2 * (32 * 4096 + 4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    assert one.loss == 2 * 256 * 2**20  # a chunk's fp32 logits and their gradient
    assert one.total == sum(vars(one).values())


def test_memory_by_layout(memory: Callable[..., Memory]) -> None:
    one = memory()
    fp32 = memory("precision.params=fp32")
    assert fp32.parameters == 2 * one.parameters
    assert fp32.optimizer == one.optimizer / 12 * 8
    data = memory(world_size=2)
    assert (data.parameters, data.optimizer) == (one.parameters, one.optimizer / 2)
    assert data.teacher_targets == one.teacher_targets
    tensor = memory("parallel={tensor: 2, sequence: true}", world_size=2)
    for name, value in vars(one).items():
        share = 1 if name == "loss" else 2  # its chunks are counted in bytes
        assert getattr(tensor, name) == value / share, name
    context = memory("parallel.context=2", world_size=2)
    assert context.optimizer == one.optimizer / 2
    assert (context.activations, context.teacher_targets) == (one.activations / 2, one.teacher_targets / 2)


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


def test_memory_of_a_pipeline_counts_the_fullest_stage(memory: Callable[..., Memory]) -> None:
    one, two = memory(), memory("parallel.pipeline=2", world_size=2)
    # Half of the layers, and of embedding and head one each
    assert two.parameters == one.parameters / 2
    assert two.teacher > one.teacher / 2  # the embedding is not halved
    # Layers 1 and 9 are on the first stage; 32, for both objectives, on the second.
    assert two.teacher_targets == max(6 * 2, 6 + 2) * 65536 * 4096 * 2
    interleaved = memory("parallel={pipeline: 2, virtual_pipeline: 2}", world_size=2)
    assert two.activations < interleaved.activations  # more micro-batches in flight


def test_memory_without_distillation_or_cross_entropy(memory: Callable[..., Memory]) -> None:
    long_text = memory("objectives.short_to_long=null", "objectives.short_restoration=null")
    assert (long_text.teacher, long_text.teacher_targets) == (0, 0)
    assert memory("objectives.long_text=null").loss == 0


def test_memory_of_logit_distillation(memory: Callable[..., Memory], architecture: Architecture) -> None:
    packed = "objectives.packed_distillation={microbatches: 4, sequence_length: 8192, data: short}"
    alone = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null", packed)
    one = memory(*alone)
    assert math.isclose(one.teacher, 2 * architecture.num_parameters(), rel_tol=1e-5)  # with its head
    assert one.teacher_targets == 65536 * 4096 * 2  # the last hidden states alone
    assert one.loss == (768 + 128) * 2**20  # three fp32 tensors of a chunk, and its bf16 logits
    baseline = memory(*alone, "objectives.packed_distillation.cross_entropy=1")
    assert (baseline.teacher, baseline.loss) == (0, 2 * 256 * 2**20)


SHORT = "microbatches: 4, sequence_length: 1024, data: short"


@pytest.fixture
def two_teachers(write: Write, values: dict[str, Any], architecture: Architecture) -> Phase:
    """short_to_long compares with /large, of 40 layers of the same size; short_restoration with model.hf."""
    own = ("objectives.short_to_long.teacher.hf=/large", "objectives.short_restoration.layers=[1, 9]")
    recipe = load_recipe(write(values), own)
    return phase_of(recipe, architecture, replace(architecture, num_layers=40))


def test_what_is_skipped_of_two_teachers(two_teachers: Phase) -> None:
    model = two_teachers.recipe.model.hf
    assert phases_summary([two_teachers], 1).partition("not computed")[2].strip() == (
        f"the teacher on long_text; teacher /large's head; teacher {model}'s layers 10 to 32; teacher {model}'s head; "
        "the model's head on short_to_long, short_restoration"
    )


def test_two_teachers_are_both_in_memory(two_teachers: Phase, architecture: Architecture) -> None:
    found = expected_memory(two_teachers, 1)
    layer, embedding = architecture.layer_parameters(), architecture.vocab_size * architecture.hidden_size
    assert found.teacher == 2 * ((40 * layer + embedding) + (9 * layer + embedding))
    assert found.teacher_targets == 2 * 65536 * 4096 * 2  # two layers of one teacher; the other's last one is less
    assert f"{found.teacher / GIB:.2f} GiB (forward only" in phases_summary([two_teachers], 1)


def test_targets_lie_where_each_teacher_has_its_layers(
    write: Write, values: dict[str, Any], architecture: Architecture
) -> None:
    """The last layer of 40 is on the second of two stages, as that of 32 is; layers 1 and 9 are on the first."""
    own = ("objectives.short_to_long.teacher.hf=/large", "parallel.pipeline=2")
    phase = phase_of(load_recipe(write(values), own), architecture, replace(architecture, num_layers=40))
    assert expected_memory(phase, 2).teacher_targets == max(6 * 2, 6 + 2) * 65536 * 4096 * 2
    # 20 layers of one and 16 of the other, each stage with a table
    layer, embedding = architecture.layer_parameters(), architecture.vocab_size * architecture.hidden_size
    assert expected_memory(phase, 2).teacher == 2 * ((20 + 16) * layer + 2 * embedding)


PERTURBED = f"objectives.perturbed_positions={{{SHORT}}}"


def test_a_student_that_is_its_own_teacher(
    write: Write, values: dict[str, Any], architecture: Architecture, summarise: Callable[..., str]
) -> None:
    alone = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null")
    assert summarise(*alone, PERTURBED).endswith("not computed           the teacher (no objective compares with it)")
    beside = summarise(PERTURBED, "objectives.short_to_long=null", "objectives.short_restoration.layers=[1, 9]")
    assert beside.endswith(
        "the teacher on long_text, perturbed_positions; the teacher's layers 10 to 32; the teacher's head; the model's "
        "head on short_restoration"
    )
    # No second model, whatever that of others is: its values are those of the student's last layer.
    packed = f"objectives.packed_distillation={{{SHORT}, teacher: {{hf: /wide}}}}"
    wide = replace(architecture, num_layers=40, hidden_size=8192)
    own = phase_of(load_recipe(write(values), [*alone, PERTURBED]), architecture)
    assert expected_memory(own, 1).teacher == 0
    assert expected_memory(own, 1).teacher_targets == 65536 * 4096 * 2
    assert expected_memory(own, 1).loss == (768 + 128) * 2**20
    for teacher in ([packed], [packed.replace(", teacher: {hf: /wide}", ""), "teacher.hf=/wide"]):
        phase = phase_of(load_recipe(write(values), [*alone, PERTURBED, *teacher]), architecture, wide)
        assert expected_memory(phase, 1).teacher_targets == 65536 * max(4096, 8192) * 2
        assert phase.sites["perturbed_positions"].teacher == architecture
        passes = ((3, architecture, 32), (1, wide, 40))  # of the packed texts: forward and backward, the teacher's
        packs = sum(times * model.forward_flops_per_token(depth, 1024, True) for times, model, depth in passes)
        assert step_flops(phase) - step_flops(own) == pytest.approx(4 * 65536 * packs)


def test_relations_keep_queries_keys_and_values(summarise: Callable[..., str], memory: Callable[..., Memory]) -> None:
    alone = ("objectives.long_text=null", "objectives.short_to_long=null", "objectives.short_restoration=null")
    relations = f"objectives.mine={{kind: relations, {SHORT}, layers: [1, 5, 17], weight: 0.5}}"
    text = summarise(*alone, relations)
    assert "0.5 mine (3 layers)   (weight x micro-batches / 4)" in text
    assert text.endswith("the teacher's layers 18 to 32; the teacher's head; the model's head on mine")
    one = memory(*alone, relations)
    # 3 layers x (32 heads of queries, 8 of keys, 8 of values) of 128 dims
    assert one.teacher_targets == 3 * 65536 * (32 + 8 + 8) * 128 * 2
    assert one.loss == 3 * BLOCK_BYTES
    tensor = memory(*alone, relations, "parallel={tensor: 2, context: 2}", world_size=4)
    assert tensor.teacher_targets == one.teacher_targets / 4


def test_attention_outputs_are_as_wide_as_hidden_states(memory: Callable[..., Memory]) -> None:
    sequence = ("parallel={tensor: 2, sequence: true}", "objectives.short_restoration.states=attention_output")
    assert memory(*sequence[1:]).teacher_targets == memory().teacher_targets
    assert memory(*sequence, world_size=2).teacher_targets == memory().teacher_targets / 2


def test_memory_without_recompute_is_more(memory: Callable[..., Memory]) -> None:
    assert memory("training.recompute=none").activations > 5 * memory().activations


def test_tied_embeddings_are_counted_once(memory: Callable[..., Memory]) -> None:
    difference = memory().parameters - memory(tied_embeddings=True).parameters
    assert difference == pytest.approx(2 * 128256 * 4096, rel=1e-6)


def test_stages_of_the_interleaved_schedule(write: Write, values: dict[str, Any], architecture: Architecture) -> None:
    recipe = load_recipe(write(values), ["parallel={pipeline: 2, virtual_pipeline: 2}"])
    assert _stages(recipe, replace(architecture, num_layers=8)) == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_memory_is_printed(summarise: Callable[..., str], memory: Callable[..., Memory]) -> None:
    text, expected = summarise(), memory()
    assert f"about {expected.total / GIB:.1f} GiB" in text
    assert f"{expected.optimizer / GIB:.2f} GiB (12 bytes x N / (data x context))" in text


def test_memory_of_selective_recomputation(memory: Callable[..., Memory]) -> None:
    kept = {how: memory(f"training.recompute={how}").activations for how in ("none", "selective", "full")}
    mlps = 65536 * 3 * 14336 * 2  # gate, up and their product of every token, bf16
    assert kept["none"] - kept["selective"] == 31 * mlps  # one layer's is recomputed at a time
    assert kept["full"] < kept["selective"]


def test_fp8_is_told(write: Callable[..., Path], values: dict[str, Any], architecture: Architecture) -> None:
    def lines(precision: str) -> str:
        recipe = load_recipe(write(values), [f"precision={precision}"])
        return phases_summary([phase_of(recipe, architecture)], 1)

    assert "FP8" not in lines("{fp8: null}")
    assert "hybrid, tensorwise scaling: student; teachers in bf16" in lines("{fp8: hybrid}")
    told = lines("{fp8: hybrid, fp8_attention: true, teacher_fp8: false}")
    assert "hybrid, delayed scaling" in told and "issue 3248" in told
