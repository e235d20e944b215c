"""The recipe: schema, loading, phases, cross-checks and the arithmetic printed at start-up."""

from longred_megatron.recipe.checks import check_phases
from longred_megatron.recipe.load import convert_paths, dump_recipe, load_recipe, phases_of
from longred_megatron.recipe.phases import Phase, read_phases
from longred_megatron.recipe.schema import Optimizer, Recipe, Training
from longred_megatron.recipe.summary import phases_summary

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
    "phases_summary",
    "read_phases",
]
