"""docs/data.md: the tokens of each run are those of its recipe, and the weights of D2 are the recipes'."""

import re
from pathlib import Path

import pytest

from longred_megatron.recipe import load_recipe
from longred_megatron.recipe.load import phases_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/data.md").read_text()
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml") if path.name.startswith(("llama", "mistral")))
BASES = {"llama3_8b_32k.yaml"}  # no run by itself


def stated() -> dict[str, dict[str, str]]:
    """Recipe -> data set -> millions of tokens, as the page has them."""
    head, _, *rows = (line.strip("| ").split("|") for line in PAGE[PAGE.index("| recipes |") :].splitlines())
    names = [each.strip() for each in head[1:]]
    cells = {row[0]: [each.strip() for each in [*row[1:], *[""] * 4][:4]] for row in rows}
    return {
        name: {key: value for key, value in zip(names, values, strict=True) if value}
        for recipes, values in cells.items()
        for name in re.findall(r"recipes/([\w.]+)", recipes)
    }


@pytest.mark.parametrize("name", sorted(set(RECIPES) - BASES))
def test_tokens_of_a_run(name: str) -> None:
    tokens: dict[str, int] = {}
    for recipe in phases_of(load_recipe(ROOT / "recipes" / name)):
        for objective in recipe.objectives.values():
            of_step = objective.microbatches * recipe.step.tokens_per_microbatch
            tokens[objective.data] = tokens.get(objective.data, 0) + of_step * recipe.training.steps
    assert stated()[name] == {data: f"{count / 1e6:,.0f}" for data, count in tokens.items()}


def test_weights_of_the_sets() -> None:
    data = load_recipe(ROOT / "recipes/llama3_8b_32k_longred_c.yaml").data
    rows = [row.split("|")[2] for row in PAGE.splitlines() if row.startswith(("| D1", "| D2", "| | ."))]
    shares = [[float(each) for each in row.split(",")] for row in rows]
    assert list(data["long"].values()) == list(data["window"].values()) == shares[0]
    *sets, first, second, third, fourth = data["short"].values()
    assert [*sets, first + second + third + fourth] == pytest.approx([share for [share] in shares[1:]])
