"""Pydantic's errors as sentences: the key's path, the value, the rule and what to change."""

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from longred_megatron.recipe.schema import Recipe
from longred_megatron.settings import Settings

_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "string_too_short": "must not be empty",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} entries, has {actual_length}",
    "too_long": "must have at most {max_length} entries, has {actual_length}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "value_error": "{error}",
}


def of_recipe(values: Any, where: str = "") -> list[str]:
    """One sentence for each value that the schema refuses, in its order; `where` goes before each key's path.

    Keys that are not texts are left out: `recipe_yaml.key_problems` has said it better.
    """
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return [_sentence(dict(details), where) for details in error.errors() if not _is_echo(dict(details))]
    return []


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `name` may be a slip of, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _is_echo(details: dict[str, Any]) -> bool:
    """Whether another message covers it: a key that is not a text, a list left empty by bad entries."""
    kind, value = details["type"], details["input"]
    if kind == "invalid_key" or (details["loc"] and details["loc"][-1] == "[key]" and kind == "string_type"):
        return True
    return kind == "too_short" and len(value) != details["ctx"]["actual_length"]


def _sentence(details: dict[str, Any], where: str) -> str:
    kind, value = details["type"], details["input"]
    path, field, siblings = _look_up(details["loc"])
    path = where + path
    if kind == "extra_forbidden":
        return _unknown_key(path, siblings)
    if kind == "union_tag_not_found":
        names = [repr(model.model_fields["method"].default) for model in _models(field and field.annotation)]
        return f"`{path}.method` is missing: add one of {', '.join(names)}"
    if kind == "union_tag_invalid":
        path, value = f"{path}.method", value["method"]
    reason = f" ({field.description})" if field is not None and field.description else ""
    if kind == "missing":
        return f"`{path}` is missing: add it{reason}"
    if value is None:
        advice = "give it a value" if field is None or field.is_required() else "give it a value or leave the key out"
        return f"`{path}` is null, which is not allowed here: {advice}{reason}"
    rule = _RULES[kind].format(**details.get("ctx", {})) if kind in _RULES else details["msg"]
    if isinstance(value, Mapping) and kind == "value_error":
        return f"`{path}` {rule}"
    return f"`{path}` is {_shown(value)}: {rule}{reason}"


def _unknown_key(path: str, siblings: list[str]) -> str:
    hint = nearest(path.rpartition(".")[2], siblings)
    advice = f"did you mean `{hint}`?" if hint else "known here: " + ", ".join(siblings)
    return f"unknown key `{path}`; {advice}"


def _look_up(location: tuple[Any, ...]) -> tuple[str, FieldInfo | None, list[str]]:
    """The dotted path of an error, its field, and the keys known beside it.

    Pydantic's location also holds parts that are no keys of the recipe: the RoPE method, and "[key]".
    """
    shown: list[str] = []
    models: list[type[Settings]] = [Recipe]
    field: FieldInfo | None = None
    siblings: list[str] = []
    for part in location:
        if len(models) > 1:
            models = [model for model in models if model.model_fields["method"].default == part]
            continue
        if part == "[key]":
            continue
        if isinstance(part, int):
            shown[-1] += f"[{part}]"
            continue
        shown.append(str(part))
        if models:
            siblings = list(models[0].model_fields)
            field = models[0].model_fields.get(part)
            models = _models(field.annotation) if field is not None else []
    return ".".join(shown), field, siblings


def _models(annotation: Any) -> list[type[Settings]]:
    """The sections an annotation names: one, none, or the several RoPE methods."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for argument in get_args(annotation) for model in _models(argument)]
    return []


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."
