"""`layers: {auto: N}` in a recipe: where it stands, and what takes its place."""

from collections.abc import Callable, Sequence
from typing import Any

from longred_megatron.errors import UserError
from longred_megatron.recipe.load import convert_values
from longred_megatron.recipe.schema import Recipe
from longred_megatron.settings import Mark


def with_layers(recipe: Recipe, choose: Callable[[int], Sequence[int]]) -> Recipe:
    """The recipe with choose(N) for each `layers: {auto: N}`, also in the changes of its phases."""
    if not auto_counts(recipe):
        return recipe
    values = recipe.model_dump(mode="json")
    return Recipe.model_validate(
        convert_values(values, Mark.LAYERS, lambda v: sorted(choose(v["auto"])) if isinstance(v, dict) else v)
    )


def auto_counts(recipe: Recipe) -> list[int]:
    """N of each `layers: {auto: N}`."""
    return [each["auto"] for each in layer_settings(recipe) if isinstance(each, dict)]


def layer_settings(recipe: Recipe) -> list[Any]:
    """The value of every key that names layers: a list, or {"auto": N}."""
    found: list[Any] = []
    convert_values(recipe.model_dump(mode="json"), Mark.LAYERS, found.append)
    return found


def spread(count: int, num_layers: int) -> list[int]:
    """`count` layers at equal distances, the last one among them. Raises UserError where there are not so many."""
    if count > num_layers:
        raise UserError(f"`layers: {{auto: {count}}}`: model.hf has {num_layers} layers; use {num_layers} or less")
    return [(i + 1) * num_layers // count for i in range(count)]
