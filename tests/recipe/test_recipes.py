"""The recipes of the released runs: they load, run on 8 GPUs, and hold the published numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.planning.summary import phases_summary
from longred_megatron.recipe import check_phases, load_recipe
from tests.recipe.conftest import phase_of

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = (
    "llama3_8b_32k_longred_c",
    "llama3_8b_32k_longred_u",
    "llama3_8b_32k_long_cpt",
    "llama3_8b_32k_pi_longred_c",
    "llama3_8b_128k_longred_c",
    "mistral_7b_128k_longred_c",
)


def model_of(name: str, llama: Architecture) -> Architecture:
    if not name.startswith("mistral"):
        return llama
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return replace(llama, family="mistral", vocab_size=32768, rope=rope, max_position_embeddings=32768)


@pytest.mark.parametrize("name", RUNS)
def test_run_on_eight_gpus(name: str, architecture: Architecture) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model = model_of(name, architecture)
    phase = phase_of(recipe, model)
    assert check_phases([phase], world_size=8) == []
    assert recipe.run.dir == RECIPES.parent / "runs" / name
    assert "1,073,741,824 = 512 steps x 2,097,152" in phases_summary([phase], 8, gpu=True)


def test_base_is_no_run() -> None:
    with pytest.raises(UserError, match=r"`run` is missing"):
        load_recipe(RECIPES / "llama3_8b_32k.yaml")
    load_recipe(RECIPES / "llama3_8b_32k.yaml", ["run.dir=x"])


# PAPERS.md's table: lengths long / short / short-to-long, a1, a2, M; and the RoPE setting.
PUBLISHED = {
    "llama3_8b_32k_longred_c": (32768, 1024, 8192, 5, 10, 6, {"method": "abf", "theta": 2e7}),
    "llama3_8b_32k_longred_u": (32768, 1024, 8192, 5, 10, 6, {"method": "abf", "theta": 2e7}),
    "llama3_8b_32k_pi_longred_c": (32768, 1024, 8192, 5, 10, 6, {"method": "pi", "factor": 4}),
    "llama3_8b_128k_longred_c": (131072, 1024, 8192, 2, 15, 3, {"method": "abf", "theta": 1e8}),
    "mistral_7b_128k_longred_c": (131072, 1024, 32768, 2, 15, 6, {"method": "abf", "theta": 2e7}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    names = ("long_text", "short_to_long", "short_restoration")
    long, skipped, short = (recipe.objectives[name] for name in names)
    assert tuple(each.kind for each in (long, skipped, short)) == names
    found = (
        long.sequence_length,
        short.sequence_length,
        skipped.sequence_length,
        short.weight,
        skipped.weight,
        len(short.layers),
        recipe.model.rope.model_dump(),
    )
    assert found == PUBLISHED[name]
    assert recipe.model.max_position_embeddings == long.sequence_length
    assert (long.microbatches, skipped.microbatches, short.microbatches) == (8, 2, 6)
    assert skipped.positions == ("uniform" if name.endswith("_u") else "cream")
    assert short.layers[-1] == 32
    assert sum(recipe.data["long"].values()) == pytest.approx(1)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps) == (2e-5, "constant", 0)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.1, (0.9, 0.95), 1e-8)


def test_blends_of_mistral_are_those_of_llama() -> None:
    llama = load_recipe(RECIPES / "llama3_8b_128k_longred_c.yaml").data
    mistral = load_recipe(RECIPES / "mistral_7b_128k_longred_c.yaml").data
    for name, blend in llama.items():
        assert {prefix.replace("/llama3/", "/mistral/"): weight for prefix, weight in blend.items()} == mistral[name]
