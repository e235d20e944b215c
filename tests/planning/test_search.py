"""Layouts that are proposed: the recipe's checks take them, and nothing better was left out."""

import json
import shlex
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from longred_megatron.errors import UserError
from longred_megatron.layout import Parallel
from longred_megatron.planning import search
from longred_megatron.planning.gpus import Gpu, read_gpu
from longred_megatron.planning.plan import plan_phase
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


def test_nothing_faster_is_left_out(phases: list[Phase]) -> None:
    """Against a list of its own: every cut of four ranks, with and without sequence parallelism and whole sequences."""
    hours = {}
    for tensor, pipeline, context in product((1, 2, 4), repeat=3):
        if 4 % (tensor * pipeline * context):
            continue
        for chunks, sequence, recompute, whole in product(
            (None, 2, 4, 8), (False, True), ("none", "selective", "full"), (False, True)
        ):
            parallel = Parallel(
                tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, context=context, sequence=sequence
            )
            phase = changed(phases[0], parallel, recompute, whole)
            if not check_phases([phase], 4, gpu=True):
                hours[parallel, recompute, whole] = plan_phase(phase, 4, gpu()).hours
    assert len(hours) > 50
    assert search.search(phases, 4, gpu()).fitting[0].hours == pytest.approx(min(hours.values()))


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
    assert len(commands) == search.MOST_SHOWN and commands[0] in capsys.readouterr().out
    outcome = search.search(read_phases(load_recipe(recipe)), 4, read_gpu("h100-80gb"))
    for command, found in zip(commands, outcome.fitting, strict=False):
        python, _, module, path, *overrides, rehearse = shlex.split(command)
        assert (python, module, path, rehearse) == ("python", "longred_megatron.train", str(recipe), "--rehearse")
        [phase] = read_phases(load_recipe(path, overrides))
        assert phase.recipe.parallel == found.plans[0].phase.recipe.parallel
        assert phase.recipe.training == found.plans[0].phase.recipe.training
