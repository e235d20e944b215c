"""A study file: its keys, and everything that can be wrong with it, told before anything runs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from longred_megatron.errors import UserError, first_few
from longred_megatron.files import read_text, reason
from longred_megatron.recipe import problems, recipe_yaml
from longred_megatron.settings import Mark, PositiveInt, RecipePath, Settings, convert_marked

MAX_RUNS, MAX_SEEDS = 200, 100
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(strict=False, min_length=1, max_length=MAX_SEEDS)
]
Texts = Annotated[tuple[RecipePath, ...], Field(strict=False, min_length=1)]


class Run(Settings):
    """A recipe that is trained, once for each seed."""

    recipe: RecipePath = Field(description="the recipe")
    overrides: tuple[str, ...] = Field(
        (),
        strict=False,
        description='changes to it, each as on the command line; "$NAME" is the export of the run NAME',
    )
    seeds: Seeds | None = Field(None, description="left out: the study's")
    evaluate: bool = Field(True, description="false: it is only there for others to start from or to learn from")


class Merge(Settings):
    """Weights between the original and each seed of a run."""

    run: str = Field(description="the run whose models are merged with the original")
    method: Literal["linear", "spherical"] = Field("linear", description="as in tools/merge.py")
    weights: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False, min_length=1)] = Field(
        description="shares of the run's model; each is a row of the table: NAME-WEIGHT"
    )


class Evaluation(Settings):
    """What is measured of every model, on the same texts and prompts."""

    short_texts: Texts = Field(description="files or folders; windows of the original model's length are cut of them")
    long_texts: Texts = Field(description="the same for windows of the longest model's length, and filler of prompts")
    short_windows: PositiveInt = Field(64, description="windows of short texts")
    long_windows: PositiveInt = Field(16, description="windows of long texts")
    lengths: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = Field(
        description="of prompts, in tokens"
    )
    depths: PositiveInt = Field(5, description="places of the needle")
    prompt_sets: PositiveInt = Field(3, description="independent sets of prompts")
    samples: PositiveInt = Field(4, description="prompts of a set, length and depth")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(2024, description="of windows and prompts")


class Ordering(Settings):
    """A claim that one row of the table is better than another."""

    measure: Literal["short", "long", "retrieval"] = Field(
        description="loss on short texts, loss on long texts (less is better), or share of the longest prompts answered"
    )
    better: str = Field(description="a row of the table; `original` is one")
    than: str = Field(description="another")
    source: str = Field("", description="who says so, with the figures")


class StudyFile(Settings):
    """A whole study. Made by `load_study`, which also makes the paths absolute."""

    title: str = Field(description="of the page")
    original: RecipePath = Field(description="Hugging Face folder that all are compared with")
    dir: RecipePath = Field(description="folder for the runs, the figures and the page")
    seeds: Seeds = Field(description="of the data's order: `training.seed` of the recipes")
    overrides: tuple[str, ...] = Field((), strict=False, description="changes to every recipe, before each run's own")
    runs: Annotated[dict[str, Run], Field(min_length=1, max_length=MAX_RUNS)] = Field(
        description="name -> what is trained"
    )
    merges: Annotated[dict[str, Merge], Field(max_length=MAX_RUNS)] = Field({}, description="name -> what is merged")
    evaluation: Evaluation = Field(description="what is measured")
    orderings: tuple[Ordering, ...] = Field((), strict=False, description="claims that are held against the figures")

    @property
    def report_dir(self) -> Path:
        """Folder of the page and the figures."""
        return self.dir / "report"

    def rows(self) -> list[str]:
        """The names of the table's rows."""
        trained = [name for name, run in self.runs.items() if run.evaluate]
        return [
            "original",
            *trained,
            *(f"{name}-{weight:g}" for name, m in self.merges.items() for weight in m.weights),
        ]

    def problems(self) -> Iterator[str]:
        """What is wrong between its sections."""
        names = [*self.runs, *self.merges]
        for name in names:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == "original" or names.count(name) > 1:
                yield f"`{name}`: names of runs and merges are letters, digits and _, each another, and not `original`"
        for name, merge in self.merges.items():
            if merge.run not in self.runs:
                yield f"`merges.{name}.run` is {merge.run!r}: no such run; known here: {first_few(list(self.runs))}"
        for i, ordering in enumerate(self.orderings):
            for key in ("better", "than"):
                if (name := getattr(ordering, key)) not in self.rows():
                    yield f"`orderings[{i}].{key}` is {name!r}: no such row; the rows are {', '.join(self.rows())}"


def load_study(path: Path, seeds: tuple[int, ...] | None = None) -> StudyFile:
    """Reads a study file; `seeds` instead of its own. Relative paths are relative to its folder.

    Raises UserError with every problem found.
    """
    try:
        values, found = recipe_yaml.parse(read_text(path, recipe_yaml.MAX_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path}: no such study file; recipes/studies has some") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a study file ({reason(error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {recipe_yaml.explain(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a study file is a mapping of sections (title:, original:, runs:, ...)")
    if seeds is not None:
        values["seeds"] = list(seeds)
    values = convert_marked(values, StudyFile, Mark.PATH, lambda value: _absolute(value, path.parent))
    found = [*found, *recipe_yaml.key_problems(values)]
    found += problems.of_section(StudyFile, values)
    if not found:
        found += StudyFile.model_validate(values).problems()
    if found:
        raise UserError(*(f"{path}: {each}" for each in found))
    return StudyFile.model_validate(values)


def _absolute(path: Any, folder: Path) -> Any:
    return os.path.abspath(folder / os.path.expanduser(path)) if isinstance(path, str) and path else path
