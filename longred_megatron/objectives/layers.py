"""The key `layers` of objectives: a list, or {auto: N}."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Discriminator, Field, Tag

from longred_megatron.errors import listed
from longred_megatron.families import Architecture
from longred_megatron.settings import Mark, PositiveInt, Settings

MAX_LAYERS = 1000


class AutoLayers(Settings):
    """Layers that the run chooses when it starts, by attention drift."""

    auto: Annotated[PositiveInt, Field(le=MAX_LAYERS)] = Field(description="number of layers, the last one among them")


if TYPE_CHECKING:  # an objective that computes anything has a list: see `recipe.auto_layers`
    Layers = tuple[int, ...]
else:
    Layers = Annotated[
        Annotated[tuple[int, ...], Field(strict=False, min_length=1, max_length=MAX_LAYERS), Tag("[list]")]
        | Annotated[AutoLayers, Tag("[auto]")],
        Discriminator(lambda value: "[auto]" if isinstance(value, dict | AutoLayers) else "[list]"),
        Mark.LAYERS,
    ]
"""Layers numbered as in Hugging Face `hidden_states`, from 1, ascending, see `_layer_problems`; or {auto: N}."""


def layer_problems(where: str, layers: Sequence[int], model: Architecture) -> Iterator[str]:
    """Whether `layers`, at the key `where`, are layers of the student in ascending order."""
    outside = [layer for layer in layers if not 1 <= layer <= model.num_layers]
    if outside:
        yield f"`{where}` holds {listed(outside)}: the layers of model.hf are 1 to {model.num_layers}"
    if list(layers) != sorted(set(layers)):
        what = "names a layer twice" if len(set(layers)) < len(layers) else "is not in ascending order"
        yield f"`{where}` is {list(layers)}: {what}; write {sorted(set(layers) - set(outside))}"
