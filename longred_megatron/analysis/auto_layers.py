"""`layers: {auto: N}` at the start of a run: chosen once, by the first rank, and recorded in the run's recipe.yaml."""

from contextlib import suppress

import torch

from longred_megatron.errors import UserError
from longred_megatron.recipe import Phase, Recipe, load_recipe, read_phases
from longred_megatron.recipe.auto_layers import auto_counts, layer_settings, with_layers
from longred_megatron.training import run_folder
from longred_megatron.training.microbatches import MicroBatchSource, open_data


def with_recorded_layers(recipe: Recipe) -> Recipe:
    """The recipe with the layers that its run has chosen before; unchanged where there is no such run."""
    if not auto_counts(recipe):
        return recipe
    with suppress(UserError):  # no run yet, or a folder of something else: `check_run_folder` tells
        ours, theirs = layer_settings(recipe), layer_settings(load_recipe(recipe.run.dir / run_folder.RECIPE))
        pairs = zip(ours, theirs, strict=False)
        recorded = {
            each["auto"]: layers
            for each, layers in pairs
            if isinstance(each, dict) and isinstance(layers, list) and len(layers) == each["auto"]
        }
        if len(ours) == len(theirs) and recorded.keys() == set(auto_counts(recipe)):
            return with_layers(recipe, recorded.__getitem__)
    return recipe


def choose_layers(recipe: Recipe, phase: Phase) -> Recipe:
    """The recipe with the layers that drift most under the RoPE of `phase`, the run's last, where it leaves them open.

    Prints them.

    Raises:
        UserError: as `layer_drift`.
    """
    if not auto_counts(recipe):
        return recipe
    from longred_megatron.analysis.layer_choice import layer_drift  # takes seconds, and only here

    found = layer_drift(phase)
    torch.cuda.empty_cache()  # the model is gone; the run's own comes next
    num_texts, length = found.tokens.shape
    for count in sorted(set(auto_counts(recipe))):
        print(
            f"layers: {{auto: {count}}} -> {found.chosen(count)}, by attention drift on {num_texts} x {length} tokens"
        )
    return with_layers(recipe, found.chosen)


def agreed(recipe: Recipe) -> tuple[Recipe, list[Phase], list[MicroBatchSource]]:
    """The first rank's recipe on every rank, and what follows from it."""
    values = [recipe.model_dump(mode="json")]
    torch.distributed.broadcast_object_list(values, src=0)  # the world: one rank has chosen
    recipe = Recipe.model_validate(values[0])
    phases = read_phases(recipe)
    return recipe, phases, open_data(phases)
