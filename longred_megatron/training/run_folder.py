"""The run folder: whose it is, where its checkpoints lie, which are kept."""

import os
import shutil
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from longred_megatron.checkpoint.distributed import DESCRIPTION
from longred_megatron.checkpoint.of_run import checkpoints
from longred_megatron.errors import UserError, listed
from longred_megatron.files import PARTIAL, reason, remove_unfinished
from longred_megatron.recipe import Recipe, convert_paths, dump_recipe, load_recipe, phases_of
from longred_megatron.settings import Mark, convert_marked
from longred_megatron.training.run_lock import LOCK

_FREE = "may change"  # in place of a value that may, between the parts of one run

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EXPORT = "hf"
RANKS = "ranks"  # what each rank is doing, see `watchdog`
_KINDS = {RECIPE: Path.is_file, METRICS: Path.is_file} | dict.fromkeys(
    (TENSORBOARD, EXPORT, RANKS, "checkpoints"), Path.is_dir
)


def check_run_folder(recipe: Recipe) -> None:
    """Raises UserError when `run.dir` holds something else than an earlier part of this very run. Writes nothing."""
    folder = recipe.run.dir
    try:
        if not folder.exists():
            return
    except OSError as error:
        raise UserError(f"run.dir: {folder}: {reason(error)}; choose another folder") from None
    if not folder.is_dir():
        raise UserError(f"run.dir: {folder} is a file; choose a folder")
    there = [(folder / name, is_kind) for name, is_kind in _KINDS.items() if os.path.lexists(folder / name)]
    if wrong := [path for path, is_kind in there if not is_kind(path)]:
        raise UserError(
            f"run.dir: {listed(wrong)}: a folder where a file should be, or the other way round, or a link to nothing; "
            "remove it"
        )
    names = {path.name for path in folder.iterdir()} - {RANKS, LOCK, TENSORBOARD}
    if not names:
        return
    if RECIPE in names:
        _check_same(folder / RECIPE, recipe)
    if RECIPE not in names or (METRICS not in names and names != {RECIPE}):  # a run writes metrics first
        raise UserError(f"run.dir: {folder} is not empty and not a run folder; choose another folder")
    _check_steps(recipe)


def _check_steps(recipe: Recipe) -> None:
    """Raises UserError unless the newest checkpoint can be read, and is of a step that the recipe reaches."""
    folder = recipe.run.dir
    last, found = sum(phase.training.steps for phase in phases_of(recipe)), checkpoints(folder)
    if found and not os.access(found[-1][1], os.R_OK | os.X_OK):
        raise UserError(f"run.dir: {found[-1][1]}: no permission to read it")
    if found and found[-1][0] > last:
        raise UserError(
            f"run.dir: {folder} has done {found[-1][0]} steps, more than the {last} of training.steps: its newest "
            f"checkpoint is {found[-1][1]}, its model in {folder / EXPORT}. Set training.steps to more than "
            f"{found[-1][0]} to go on, or choose another run.dir for a run of {last} steps"
        )


def _check_same(stored: Path, recipe: Recipe) -> None:
    """Raises UserError unless `recipe` goes on where the stored one ended."""
    try:
        earlier = load_recipe(stored)
    except UserError as error:
        raise UserError(
            f"run.dir: {stored.parent} belongs to another recipe, or its {RECIPE} was changed ({error.problems[0]}); "
            "choose another run.dir to start anew"
        ) from None
    # Both as this version writes them: the stored one may be of an earlier version, with older names of keys.
    before, now = (yaml.safe_load(dump_recipe(each)) for each in (earlier, recipe))
    paths: list[Any] = []
    convert_paths(before, paths.append)
    now = convert_paths(now, lambda path: _before_a_move(path, recipe.run.dir, earlier.run.dir, paths))
    old, new = _flat(_without_free(before)), _flat(_without_free(now))
    # Of phases only the last may change its length: an earlier one may be over, and later steps would move.
    length = f"phases[{len(recipe.phases) - 1}].training.steps" if recipe.phases else "training.steps"
    changed = [
        k
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k) and k != length and _FREE not in (old.get(k), new.get(k))
    ]
    if changed:
        listing = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"run.dir: {recipe.run.dir} belongs to another recipe ({listing}{more}); "
            "choose another run.dir to start anew, or restore these keys to go on"
        )


def _before_a_move(path: Any, folder: Path, old_folder: Path, old_paths: list[Any]) -> Any:
    """`path` as it was when the run began: what was moved together with the run folder lies as before, seen from it."""
    if not isinstance(path, str) or path in old_paths:
        return path
    moved = os.path.normpath(old_folder / os.path.relpath(path, folder))
    return moved if moved in old_paths else path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return folder / "checkpoints" / f"step-{step:06}"


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is no longer one of `checkpoints`. Returns its new path."""
    return path.rename(_free(path.with_name(f"damaged-{path.name}")))


def set_export_aside(path: Path, step: int | None) -> Path:
    """Renames an export, which is the model after `step` if that is known. Returns its new path."""
    return path.rename(_free(path.with_name(f"{EXPORT}-earlier" if step is None else f"{EXPORT}-step-{step:06}")))


def _free(path: Path) -> Path:
    """`path`, or where something is there path-2, path-3, ..."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(each for each in names if not os.path.lexists(each))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed process left half-written."""
    for _, path in checkpoints(folder)[:-keep]:
        if (path / DESCRIPTION).is_file():  # a checkpoint, and not something else of its name
            shutil.rmtree(path)
    for path in (folder / "checkpoints").glob(f"*{PARTIAL}"):
        remove_unfinished(path)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    if prefix == "phases" and values:
        for i, phase in enumerate(values):  # null is a change there, and no default
            flat |= {key: "null" if value is None else value for key, value in _flat(phase, f"phases[{i}]").items()}
        return flat | {"phases": len(values)}
    if not isinstance(values, dict):
        return {prefix: values}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _without_free(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values, and its phases' changes, without what may change: on what it runs, what it keeps."""
    fixed: dict[str, Any] = convert_marked(values, Recipe, Mark.FREE, lambda _: _FREE)
    if fixed["phases"]:
        fixed["phases"] = [convert_marked(change, Recipe, Mark.FREE, lambda _: _FREE) for change in fixed["phases"]]
    return fixed
