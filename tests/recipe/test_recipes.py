"""The recipes of the released runs: they load, run on 8 GPUs, and hold the published numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.planning.summary import phases_summary
from longred_megatron.recipe import Recipe, check_phases, load_recipe
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


# Lengths long / short / short-to-long, a1, a2, M; and the RoPE setting: LongReD's table of settings.
SETTINGS = {
    "llama3_8b_32k": (32768, 1024, 8192, 5, 10, 6, {"method": "abf", "theta": 2e7}),
    "llama3_8b_32k_pi": (32768, 1024, 8192, 5, 10, 6, {"method": "pi", "factor": 4}),
    "llama3_8b_128k": (131072, 1024, 8192, 2, 15, 3, {"method": "abf", "theta": 1e8}),
    "mistral_7b_128k": (131072, 1024, 32768, 2, 15, 6, {"method": "abf", "theta": 2e7}),
}
PUBLISHED = [f"{model}_longred_{positions}" for model in SETTINGS for positions in "cu"]
BASELINES = [f"{model}_{baseline}" for model in SETTINGS for baseline in ("long_cpt", "mix_cpt")]
D1 = {"commoncrawl": 0.534, "c4": 0.266, "github": 0.050, "arxiv": 0.043, "books": 0.041}
D1 |= {"wikipedia": 0.034, "stackexchange": 0.032}
D2 = {"fineweb_edu": 0.476, "fineweb_edu_math": 0.0722, "proof_pile_2": 0.0230, "stack_v2": 0.095, "pg19": 0.095}
D2 |= {"wikipedia": 0.096, "arxiv": 0.095}  # and instructions: .047 in all


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
    assert found == SETTINGS[name.rpartition("_longred_")[0]]
    assert recipe.model.max_position_embeddings == long.sequence_length
    assert (long.microbatches, skipped.microbatches, short.microbatches) == (8, 2, 6)
    assert skipped.positions == ("uniform" if name.endswith("_u") else "cream")
    assert short.layers[-1] == 32
    if len(short.layers) == 3:
        assert short.layers == (9, 15, 32)
    check_data(recipe)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps) == (2e-5, "constant", 0)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.1, (0.9, 0.95), 1e-8)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_as_long_and_as_large(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    long, short, window, *_, rope = SETTINGS[name.rpartition("_")[0].rpartition("_")[0]]
    lengths = {long: 16} if name.endswith("long_cpt") else {long: 8, window: 2, short: 6}
    assert {each.kind for each in recipe.objectives.values()} <= {"long_text", "next_token"}
    assert {each.sequence_length: each.microbatches for each in recipe.objectives.values()} == lengths
    assert recipe.model.rope.model_dump() == rope and recipe.model.max_position_embeddings == long
    assert (recipe.training.steps, recipe.step.tokens_per_microbatch) == (512, 131072)
    check_data(recipe)


def check_data(recipe: Recipe) -> None:
    """The published weights, D2's as corrected; "long" and "window" are D1 and D3."""
    for name in {"long", "window"} & recipe.data.keys():
        assert {Path(prefix).name.rpartition("_")[2]: weight for prefix, weight in recipe.data[name].items()} == D1
    if "short" in recipe.data:
        weights = {Path(prefix).name: weight for prefix, weight in recipe.data["short"].items()}
        instructions = sum(weight for prefix, weight in weights.items() if prefix not in D2)
        assert weights.items() >= D2.items() and instructions == pytest.approx(0.047)
        assert sum(weights.values()) == pytest.approx(0.9992)


def test_blends_of_mistral_are_those_of_llama() -> None:
    llama = load_recipe(RECIPES / "llama3_8b_128k_longred_c.yaml").data
    mistral = load_recipe(RECIPES / "mistral_7b_128k_longred_c.yaml").data
    for name, blend in llama.items():
        assert {prefix.replace("/llama3/", "/mistral/"): weight for prefix, weight in blend.items()} == mistral[name]
