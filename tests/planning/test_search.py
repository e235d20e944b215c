"""Layouts that are proposed: the recipe's checks take them, and nothing better was left out."""

import json
import random
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml

from longred_megatron.errors import UserError
from longred_megatron.layout import Parallel
from longred_megatron.planning import search
from longred_megatron.planning.gpus import Gpu, read_gpu
from longred_megatron.planning.plan import layout, plan_phase
from longred_megatron.recipe import Phase, check_phases, load_recipe, read_phases
from tests.training.test_rehearsal import RECIPES, hf_overrides
from tests.training.workspace import make_workspace
from tools import plan

SIZES: dict[str, Any] = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"precision": {"params": "bf16"}, "step": {"tokens_per_microbatch": 512}}
    return make_workspace(tmp_path_factory.mktemp("search"), "llama_3", SIZES, **settings)


@pytest.fixture(scope="module")
def phases(recipe: Path) -> list[Phase]:
    return read_phases(load_recipe(recipe))


def gpu(memory_bytes: float = 1e12) -> Gpu:
    return read_gpu("h100-80gb").model_copy(update={"memory_bytes": memory_bytes, "reserved_bytes": 0.0})


@pytest.mark.parametrize("world", [1, 2, 8, 12])
def test_every_proposal_passes_the_recipe_s_checks(world: int, phases: list[Phase]) -> None:
    outcome = search.search(phases, world, gpu())
    assert outcome.fitting
    for found in outcome.fitting:
        assert check_phases([each.phase for each in found.plans], world, gpu=True) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fp8", [False, True])
def test_nothing_faster_is_left_out(seed: int, fp8: bool, phases: list[Phase]) -> None:
    """Against a list of its own, of a random model and step: every cut of a few ranks, every split of the layers, with
    and without sequence parallelism and whole sequences, where a half to a tenth of them fits."""
    draw = random.Random(seed)
    world, phase = draw.choice((2, 4, 4)), random_phase(phases[0], draw)
    tried = in_fp8(phase) if fp8 else phase
    plans = [
        plan_phase(each, world, gpu())
        for parallel in cuts(world, phase.source.num_layers)
        for each in all_ways(tried, parallel, world)
    ]
    if fp8 and not plans:
        assert search.search([phase], world, gpu()).with_fp8 == []
        return
    needs = sorted(plan.needed_bytes for plan in plans)
    room = needs[len(needs) // draw.choice((2, 4, 10))]
    best = min((plan for plan in plans if plan.needed_bytes <= room), key=lambda plan: plan.hours)
    outcome = search.search([phase], world, gpu(room))
    found = (outcome.with_fp8 if fp8 else outcome.fitting)[0]
    assert found.hours <= 1.03 * best.hours, f"{layout(found.plans[0])}\n{layout(best)}"


def in_fp8(phase: Phase) -> Phase:
    precision = phase.recipe.precision.model_copy(update={"fp8": "hybrid"})
    return replace(phase, recipe=phase.recipe.model_copy(update={"precision": precision}))


def random_phase(phase: Phase, draw: random.Random) -> Phase:
    """With another model and step: from small ones, that the process on the CPU holds up, to large ones with a large
    vocabulary."""
    scale = draw.choice((1, 16, 64))
    source = replace(
        phase.source,
        num_layers=draw.choice((4, 5, 6)),
        hidden_size=draw.choice((512, 1024, 4096)),
        intermediate_size=draw.choice((1024, 8192)),
        vocab_size=draw.choice((1024, 32768, 262144)),
        head_dim=128,
        max_position_embeddings=scale * phase.source.max_position_embeddings,
    )
    recipe, objectives = phase.recipe, {}
    for name, own in recipe.objectives.items():
        changes = {"microbatches": draw.choice((2, 4)), "sequence_length": scale * own.sequence_length}
        objectives[name] = own.model_copy(update=changes)
    window = scale * recipe.model.max_position_embeddings
    step = recipe.step.model_copy(update={"tokens_per_microbatch": scale * recipe.step.tokens_per_microbatch})
    model = recipe.model.model_copy(update={"max_position_embeddings": window})
    recipe = recipe.model_copy(update={"objectives": objectives, "step": step, "model": model})
    return replace(phase, recipe=recipe, source=source, teachers=dict.fromkeys(phase.teachers, source))


def cuts(world: int, depth: int) -> Iterator[Parallel]:
    """Every layout, with every split of the layers over its chunks."""
    for tensor, pipeline, context in product((1, 2, 4), repeat=3):
        if world % (tensor * pipeline * context):
            continue
        for virtual, sequence in product((None, 2, 4) if pipeline > 1 else (None,), {False, tensor > 1}):
            ends = combinations(range(1, depth), pipeline * (virtual or 1) - 1)
            for split in ends:
                sizes = tuple(b - a for a, b in pairwise((0, *split, depth)))
                yield Parallel(
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    layers_per_chunk=sizes if pipeline > 1 else None,
                    context=context,
                    sequence=sequence,
                )


def all_ways(phase: Phase, parallel: Parallel, world: int) -> Iterator[Phase]:
    for recompute, whole in product(("none", "selective", "full"), {False, parallel.context > 1}):
        changed_phase = changed(phase, parallel, recompute, whole)
        if not check_phases([changed_phase], world, gpu=True):
            yield changed_phase


def changed(phase: Phase, parallel: Parallel, recompute: str, whole: bool) -> Phase:
    recipe = phase.recipe
    training = recipe.training.model_copy(update={"recompute": recompute})
    objectives = {n: o.model_copy(update={"whole_sequences": whole}) for n, o in recipe.objectives.items()}
    update = {"parallel": parallel, "training": training, "objectives": objectives}
    return replace(phase, recipe=recipe.model_copy(update=update))


def test_less_memory_leaves_fewer(phases: list[Phase]) -> None:
    roomy = search.search(phases, 8, gpu())
    needs = sorted(found.needed_bytes for found in roomy.fitting)
    tight = search.search(phases, 8, gpu(needs[len(needs) // 2]))
    assert len(tight.fitting) + tight.too_large == len(roomy.fitting)
    assert 0 < len(tight.fitting) < len(roomy.fitting)
    assert all(found.needed_bytes <= needs[len(needs) // 2] for found in tight.fitting)
    none = search.search(phases, 8, gpu(1.0))
    assert none.fitting == [] and none.least_bytes == needs[0]
    assert "no layout fits on 8 GPUs" in search.report(none, gpu(1.0))


def test_fp8_only_where_it_is_asked_of_a_gpu_that_has_it(phases: list[Phase]) -> None:
    """And beside the others, as it changes what is computed."""
    outcome = search.search(phases, 8, gpu())
    assert len(outcome.with_fp8) == search.MOST_FP8_SHOWN
    assert all(p.phase.recipe.precision.fp8 == "hybrid" for each in outcome.with_fp8 for p in each.plans)
    assert all(p.phase.recipe.precision.fp8 is None for each in outcome.fitting for p in each.plans)
    for found in outcome.with_fp8:
        assert check_phases(found.phases, 8, gpu=True) == []
    assert "precision.fp8=hybrid" in search.overrides_of(outcome.with_fp8[0])
    assert "with precision.fp8=hybrid, which changes what is computed" in search.report(outcome, gpu())
    own = search.search([in_fp8(phase) for phase in phases], 8, gpu())
    assert own.with_fp8 == [] and own.fitting[0].phases[0].recipe.precision.fp8 == "hybrid"
    assert search.search(phases, 8, read_gpu("a100-80gb")).with_fp8 == []


def test_fp8_also_where_bf16_does_not_fit(phases: list[Phase]) -> None:
    """Of many tokens a small model keeps less in FP8, by more than the copies of its weights take."""
    phase = random_phase(phases[0], random.Random(6))
    roomy = search.search([phase], 1, gpu())
    bf16, fp8 = ({e.phases[0].recipe.training.recompute: e for e in own} for own in (roomy.fitting, roomy.with_fp8))
    room = fp8["none"].needed_bytes
    assert room < bf16["none"].needed_bytes
    tight = search.search([phase], 1, gpu(room))
    assert "none" not in {each.phases[0].recipe.training.recompute for each in tight.fitting}
    assert tight.with_fp8[0].hours == fp8["none"].hours


def test_the_fewest_gpus(phases: list[Phase]) -> None:
    alone = min(found.needed_bytes for found in search.search(phases, 1, gpu()).fitting)
    assert search.fewest_gpus(phases, gpu(alone), 64).world_size == 1
    more = search.fewest_gpus(phases, gpu(alone * 0.9), 64)
    assert more.fitting and more.world_size > 1


def test_the_settings_can_be_put_into_the_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(recipe), "--gpu", "h100-80gb", "--gpus", "8", "--search", "--output", str(tmp_path / "o")]
    plan.main(asked)
    assert "settings of the first:" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "o" / "layout.yaml").read_text())
    own = tmp_path / "own.yaml"
    base = tmp_path / "base.yaml"  # with a layout of its own, of which nothing is left
    base.write_text(yaml.safe_dump({"base": str(recipe), "parallel": {"pipeline": 2, "virtual_pipeline": 2}}))
    own.write_text(yaml.safe_dump({"base": str(base), **settings}))
    again = read_phases(load_recipe(own))
    content = json.loads((tmp_path / "o" / "plan.json").read_text())
    assert check_phases(again, 8, gpu=True) == []
    assert plan_phase(again[0], 8, read_gpu("h100-80gb")).step_seconds == pytest.approx(content["step_seconds"])


def test_nothing_fits(recipe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(
        "gpus: {small: {memory_bytes: 1.0e+6, bf16_flops: 1.0e+12, fp8_flops: null, memory_bandwidth: 1.0e+9,\n"
        "  link_bandwidth: 1.0e+9, network_bandwidth: 1.0e+9}}\n"
    )
    with pytest.raises(UserError, match="no layout fits on 2 GPUs"):
        plan.main([str(recipe), "--gpu", str(small), "--gpus", "2", "--search"])
    with pytest.raises(UserError, match="--gpus is missing"):
        plan.main([str(recipe), "--gpu", "h100-80gb"])


@pytest.mark.parametrize("name", ["llama3_8b_32k_longred_c", "llama3_8b_128k_longred_c"])
def test_a_thousand_gpus_take_seconds(name: str, tmp_path: Path) -> None:
    many = read_phases(load_recipe(RECIPES / f"{name}.yaml", hf_overrides(name, tmp_path)))
    start = time.process_time()
    assert len(search.search(many, 1024, read_gpu("h100-80gb")).fitting) > 400
    assert time.process_time() - start < 10


def test_each_proposal_has_its_rehearsal(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(recipe), "parallel.pipeline=2", "--gpu", "h100-80gb", "--gpus", "4", "--search"]
    plan.main([*asked, "--output", str(tmp_path / "o")])
    _, *commands = (tmp_path / "o" / "rehearse.sh").read_text().splitlines()
    assert commands[0] in capsys.readouterr().out
    outcome = search.search(read_phases(load_recipe(recipe)), 4, read_gpu("h100-80gb"))
    shown = [*outcome.fitting[: search.MOST_SHOWN], *outcome.with_fp8]
    for command, found in zip(commands, shown, strict=True):
        python, _, module, path, *overrides, rehearse = shlex.split(command)
        assert (python, module, path, rehearse) == ("python", "longred_megatron.train", str(recipe), "--rehearse")
        [phase] = read_phases(load_recipe(path, overrides))
        assert phase.recipe.parallel == found.parallel
        assert phase.recipe.precision == found.phases[0].recipe.precision
        assert phase.recipe.training == found.plans[0].phase.recipe.training
