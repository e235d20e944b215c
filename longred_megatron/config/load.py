"""Reads a recipe: inheritance, command-line overrides, paths, and every problem in one message."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from longred_megatron.config import problems, recipe_yaml
from longred_megatron.config.schema import Recipe
from longred_megatron.errors import UserError

PATH_KEYS = (("model", "hf"), ("teacher", "hf"), ("run", "dir"), ("debug", "dump_microbatches"))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path`, its bases, and `overrides` such as "training.steps=100".

    A child is merged over its `base` key by key. Replaced whole are lists, blends of `data`, and `model.rope`
    when the method changes. Null removes an inherited objective, data set or teacher.
    Relative paths are relative to the file that holds them; those of `overrides` to the working directory.

    Raises UserError with every problem found.
    """
    found: list[str] = []
    values = _read_chain(Path(os.path.abspath(path)), found, seen=())
    values = _merge(values, _read_overrides(overrides, found))
    found += recipe_yaml.key_problems(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(*found, *problems.describe(error)) from None
    if found:
        raise UserError(*found)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults and absolute paths written out; `load_recipe` reads an equal one back."""
    values = recipe.model_dump(mode="json")
    values["objectives"] = {name: values["objectives"][name] for name, _ in recipe.objectives.items()}
    return recipe_yaml.dump(values)


def _read_chain(path: Path, found: list[str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of `path` merged over its base's, and so on up; appends to `found` what can wait."""
    if path in seen:
        raise UserError(f"{seen[0]}: `base` goes in a circle: " + " -> ".join(map(str, (*seen, path))))
    values = _read_file(path, found, named_by=seen[-1] if seen else None)
    base = values.pop("base", None)
    values = _absolute_paths(values, path.parent)
    if base is None:
        return values
    if not isinstance(base, str) or not base:
        found.append(f"{path}: `base` is {base!r}: must be the path of one recipe")
        return values
    return _merge(_read_chain(Path(_absolute(base, path.parent)), found, (*seen, path)), values)


def _read_file(path: Path, found: list[str], named_by: Path | None) -> dict[str, Any]:
    where = f"{path} (the base of {named_by})" if named_by else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = problems.nearest(path.name, nearby)
        raise UserError(f"{where}: no such recipe" + (f"; did you mean {hint}?" if hint else "")) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read as a text file: {error}") from None
    try:
        values, duplicates = recipe_yaml.parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {recipe_yaml.explain(error)}") from None
    found += [f"{where}: {duplicate}" for duplicate in duplicates]
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{where}: a recipe is a mapping of sections (model:, step:, ...), this file is {kind}")
    return values


def _read_overrides(overrides: Sequence[str], found: list[str]) -> dict[str, Any]:
    """All overrides as one mapping, so that their order does not matter."""
    combined: dict[str, Any] = {}
    given: set[str] = set()
    for override in overrides:
        key, _, text = override.partition("=")
        problem = f"override `{key}` is given twice; keep one" if key in given else _key_problem(override)
        if problem:
            found.append(problem)
            continue
        given.add(key)
        try:
            value, duplicates = recipe_yaml.parse(text)
        except yaml.YAMLError as error:
            found.append(f"override {override!r}: not valid YAML: {recipe_yaml.explain(error)}")
            continue
        found += [f"override {override!r}: {duplicate}" for duplicate in duplicates]
        for name in reversed(key.split(".")):
            value = {name: value}
        combined = _merge(combined, value)
    return _absolute_paths(combined, Path.cwd())


def _key_problem(override: str) -> str | None:
    key, equals, _ = override.partition("=")
    keys = key.split(".")
    if not equals or not all(keys) or key.startswith("-"):
        return f"override {override!r}: must look like training.steps=100 (section.key=value)"
    if key == "base":
        return "override `base`: a base cannot be given on the command line; write it into a recipe"
    if keys[0] == "data" and len(keys) > 2:
        return f"override `{key}`: a blend is set as a whole: data.{keys[1]}={{PREFIX: WEIGHT, ...}}"
    return None


def _merge(base: dict[str, Any], child: dict[str, Any], keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """`child` over `base`; see `load_recipe` for what is replaced whole and what null removes."""
    merged = dict(base)
    for name, value in child.items():
        inherited = base.get(name)
        where = (*keys, name)
        if value is None and name in base and _is_removable(where):
            del merged[name]
        elif isinstance(value, dict) and isinstance(inherited, dict) and not _is_whole(where, inherited, value):
            merged[name] = _merge(inherited, value, where)
        else:
            merged[name] = value
    return merged


def _is_removable(keys: tuple[str, ...]) -> bool:
    return keys == ("teacher",) or (len(keys) == 2 and keys[0] in ("objectives", "data"))


def _is_whole(keys: tuple[str, ...], inherited: dict[str, Any], value: dict[str, Any]) -> bool:
    if keys == ("model", "rope"):
        return "method" in value and value["method"] != inherited.get("method", value["method"])
    return len(keys) == 2 and keys[0] == "data"


def _absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of `values` with absolute paths; what is not a path is left for the schema to complain about."""
    values = dict(values)
    for section, key in PATH_KEYS:
        settings = values.get(section)
        if isinstance(settings, dict) and isinstance(settings.get(key), str):
            values[section] = {**settings, key: _absolute(settings[key], folder)}
    if isinstance(values.get("data"), dict):
        values["data"] = {
            name: {_absolute(prefix, folder): weight for prefix, weight in blend.items()}
            if isinstance(blend, dict)
            else blend
            for name, blend in values["data"].items()
        }
    return values


def _absolute(path: Any, folder: Path) -> Any:
    if not isinstance(path, str) or not path:
        return path
    return os.path.abspath(folder / os.path.expanduser(path))
