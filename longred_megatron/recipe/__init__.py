"""The recipe: schema, loading, phases and cross-checks."""

from longred_megatron.recipe.checks import check_phases
from longred_megatron.recipe.load import convert_paths, dump_recipe, load_recipe, phases_of
from longred_megatron.recipe.phases import Phase, read_phases
from longred_megatron.recipe.schema import Optimizer, Recipe, Training

__all__ = [
    "Optimizer",
    "Phase",
    "Recipe",
    "Training",
    "check_phases",
    "convert_paths",
    "dump_recipe",
    "load_recipe",
    "phases_of",
    "read_phases",
]
