"""Reads a recipe: inheritance, command-line overrides, paths, and every problem in one message."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from longred_megatron.errors import UserError
from longred_megatron.files import read_text, reason
from longred_megatron.objectives.base import Objective
from longred_megatron.recipe import problems, recipe_yaml
from longred_megatron.recipe.schema import MAX_PHASES, Recipe
from longred_megatron.settings import Mark, convert_marked, marked_keys

# What a phase may change; the rest is the same for a whole run.
PHASE_KEYS = tuple(marked_keys(Recipe, Mark.PHASE))
MAX_PROBLEMS = 50  # of one message
MAX_BASES = 16
MAX_KEY_DEPTH = 8  # names of an override's key; the deepest has 5


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path`, its bases, and `overrides` such as "training.steps=100".

    A child is merged over its `base` key by key. Replaced whole are lists, blends of `data`, `model.rope` when the
    method changes, and an objective when its kind does. Null removes an inherited objective, data set or teacher.
    Relative paths are relative to the file that holds them; those of `overrides` to the working directory.
    Overrides change the recipe before its phases are merged over it; "phases.1.training.steps=100" changes the second.
    A phase's `steps` is short for its `training.steps`.

    Raises UserError with every problem found.
    """
    found: list[str] = []
    values = _read_chain(Path(os.path.abspath(path)), found, seen=())
    values = _merge(values, _read_overrides([o for o in overrides if not o.startswith("phases.")], found))
    of_phases = _read_overrides([o for o in overrides if o.startswith("phases.")], found)
    values = _merge_into_phases(values, of_phases.get("phases", {}), found)
    found += recipe_yaml.key_problems(values)
    found += problems.of_recipe(values) + _phase_problems(values)
    if found:
        more = len(found) - MAX_PROBLEMS
        raise UserError(*found[:MAX_PROBLEMS], *([f"and {more:,} more"] if more > 0 else []))
    return Recipe.model_validate(values)


def phases_of(recipe: Recipe) -> list[Recipe]:
    """One recipe for each phase: `recipe` with that phase's changes; [recipe] where there are none."""
    if recipe.phases is None:
        return [recipe]
    values = {**recipe.model_dump(mode="json"), "phases": None}
    return [Recipe.model_validate(_merge(values, change)) for change in recipe.phases]


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults and absolute paths written out; `load_recipe` reads an equal one back."""
    return recipe_yaml.dump(recipe.model_dump(mode="json"))


def _read_chain(path: Path, found: list[str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of `path` merged over its base's, and so on up; appends to `found` what can wait."""
    if len(seen) > MAX_BASES:
        raise UserError(f"{seen[0]}: more than {MAX_BASES} recipes, each the `base` of the one before; join some")
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
        text = read_text(path, recipe_yaml.MAX_BYTES)
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{where}: a link to {path.readlink()}, which does not exist; correct it") from None
        nearby = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = problems.nearest(path.name, nearby)
        raise UserError(f"{where}: no such recipe" + (f"; did you mean {hint}?" if hint else "")) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where!r}: cannot be read as a recipe ({reason(error)})") from None
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
            found.append(f"override {problems.shown(override)}: not valid YAML: {recipe_yaml.explain(error)}")
            continue
        found += [f"override {problems.shown(override)}: {duplicate}" for duplicate in duplicates]
        for name in reversed(key.split(".")):
            value = {name: value}
        combined = _merge(combined, value)
    return _absolute_paths(combined, Path.cwd())


def _spelled_out(change: Any, where: str, found: list[str]) -> Any:
    """A phase's changes with `steps`, which is short for `training.steps`, in its place, and in new names."""
    if not isinstance(change, dict):
        return change
    rest = _in_new_names({key: value for key, value in change.items() if key != "steps"})
    if "steps" not in change:
        return rest
    training = rest.get("training", {})
    if not isinstance(training, dict) or "steps" in training:
        found.append(f"`{where}.steps` is short for `{where}.training.steps`: give one of them")
        return rest
    return rest | {"training": training | {"steps": change["steps"]}}


def _in_new_names(values: dict[str, Any]) -> dict[str, Any]:
    objectives = values.get("objectives")
    if not isinstance(objectives, dict):
        return values
    return {**values, "objectives": {name: Objective.in_new_names(own) for name, own in objectives.items()}}


def _merge_into_phases(values: dict[str, Any], changes: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """`changes` {number from 0, as text: changes to that phase} merged into the phases of `values`."""
    phases = values.get("phases")
    phases = list(phases) if isinstance(phases, list) else []
    phases = [_spelled_out(phase, f"phases[{i}]", found) for i, phase in enumerate(phases)]
    for number, change in changes.items():
        if number not in map(str, range(len(phases))):
            numbers = f"phases 0 to {len(phases) - 1}" if phases else "no phases"
            found.append(f"override `phases.{number}`: the recipe has {numbers}")
        elif isinstance(change, dict) and isinstance(phases[int(number)], dict):
            change = _spelled_out(_absolute_paths(change, Path.cwd()), f"phases.{number}", found)
            # Below "phases" null removes nothing: it is a phase's word that removes what the recipe has.
            phases[int(number)] = _merge(phases[int(number)], change, ("phases", number))
        else:
            phases[int(number)] = change
    return {**values, "phases": phases} if phases else values


def _phase_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with each phase, beside what it shares with the recipe."""
    phases, found = values.get("phases"), []
    if not isinstance(phases, list) or len(phases) > MAX_PHASES:
        return []
    recipe = {**values, "phases": None}
    try:  # as `phases_of` has it
        recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        recipe = _in_new_names(recipe)
    for i, change in enumerate(phases):
        if not isinstance(change, dict):
            continue  # the schema's to complain about
        found += [
            f"`phases[{i}].{key}` is the same for the whole run: a phase may change {', '.join(PHASE_KEYS)}; "
            "set it outside of phases"
            for key in _keys_of_the_run(change)
        ]
        found += problems.of_recipe(_merge(recipe, change), f"phases[{i}].", but=recipe)
    return found


def _keys_of_the_run(change: dict[str, Any]) -> list[str]:
    """The keys of a phase that the schema knows and a phase may not change."""
    split = {key.split(".")[0] for key in PHASE_KEYS if "." in key}  # sections of which a phase may change some keys
    found = []
    for name, value in change.items():
        field = Recipe.model_fields.get(name)
        if name in split and field is not None and isinstance(value, dict):
            known = field.annotation.model_fields if field.annotation else {}
            found += [f"{name}.{key}" for key in value if key in known]
        elif field is not None:
            found.append(name)
    return [key for key in found if key not in PHASE_KEYS]


def _key_problem(override: str) -> str | None:
    key, equals, _ = override.partition("=")
    keys = key.split(".")
    blend = keys[2:] if keys[0] == "phases" else keys
    if not equals or not all(keys) or key.startswith("-") or len(keys) > MAX_KEY_DEPTH:
        return f"override {problems.shown(override)}: must look like training.steps=100 (section.key=value)"
    if key == "base":
        return "override `base`: a base cannot be given on the command line; write it into a recipe"
    if blend[:1] == ["data"] and len(blend) > 2:
        whole = key.removesuffix("." + ".".join(blend[2:]))
        return f"override `{key}`: a blend is set as a whole: {whole}={{PREFIX: WEIGHT, ...}}"
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
    keys = keys[2:] if keys[0] == "phases" else keys
    if keys == ("model", "rope"):
        return "method" in value and value["method"] != inherited.get("method", value["method"])
    if len(keys) == 2 and keys[0] == "objectives":
        return "kind" in value and value["kind"] != inherited.get("kind", keys[1])
    return len(keys) == 2 and keys[0] == "data"


def convert_paths(values: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of a recipe's values, as YAML holds them, with `convert` applied to all its paths."""
    return convert_values(values, Mark.PATH, convert)


def convert_values(values: dict[str, Any], mark: Mark, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """The same for the values that have `mark`, also in the changes of phases."""
    values = convert_marked(values, Recipe, mark, convert)
    if isinstance(values.get("phases"), list):
        values["phases"] = [convert_values(p, mark, convert) if isinstance(p, dict) else p for p in values["phases"]]
    return values


def _absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of `values` with absolute paths; what is not a path is left for the schema to complain about."""
    return convert_paths(values, lambda path: _absolute(path, folder))


def _absolute(path: Any, folder: Path) -> Any:
    if not isinstance(path, str) or not path:
        return path
    return os.path.abspath(folder / os.path.expanduser(path))
