"""What every section of a recipe is made of: a closed, strict model, and the types of its values."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A section of the recipe: closed, read-only and without silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _not_empty(path: Path) -> Path:
    if path == Path():
        raise ValueError("must be a path, not an empty text")
    return path


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
RecipePath = Annotated[Path, Field(strict=False), AfterValidator(_not_empty)]
"""Absolute once loaded: `load_recipe` takes relative ones from the folder of the file that names them."""
