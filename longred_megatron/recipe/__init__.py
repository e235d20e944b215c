"""The recipe: schema, loading, cross-checks and the arithmetic printed at start-up."""

from longred_megatron.families import Architecture, read_architecture
from longred_megatron.layout import Parallel, Precision
from longred_megatron.recipe.checks import check_recipe, rope_extension
from longred_megatron.recipe.load import dump_recipe, load_recipe, phases_of
from longred_megatron.recipe.phases import Phase, check_phases, phases_summary, read_phases
from longred_megatron.recipe.schema import (
    LongText,
    Objectives,
    Optimizer,
    Recipe,
    ShortRestoration,
    ShortToLong,
    Training,
)

__all__ = [
    "Architecture",
    "LongText",
    "Objectives",
    "Optimizer",
    "Parallel",
    "Phase",
    "Precision",
    "Recipe",
    "ShortRestoration",
    "ShortToLong",
    "Training",
    "check_phases",
    "check_recipe",
    "dump_recipe",
    "load_recipe",
    "phases_of",
    "phases_summary",
    "read_architecture",
    "read_phases",
    "rope_extension",
]
