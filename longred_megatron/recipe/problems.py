"""Pydantic's errors as sentences: the key's path, the value, the rule and what to change."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from longred_megatron.errors import plain
from longred_megatron.recipe.schema import Recipe
from longred_megatron.settings import Settings, sections_of, tags, value_type

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
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} entries, has {actual_length}",
    "too_long": "must have at most {max_length} entries, has {actual_length}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "value_error": "{error}",
}


def of_recipe(values: Any, where: str = "", but: Any = None) -> list[str]:
    """`of_section` of a recipe."""
    return of_section(Recipe, values, where, but)


def of_section(schema: type[Settings], values: Any, where: str = "", but: Any = None) -> list[str]:
    """One sentence for each value that the schema refuses, in its order; `where` goes before each key's path.

    but: other values; what is refused of them in the same way is left out. So are keys that are not texts:
    `recipe_yaml.key_problems` has said it better.
    """
    known = [] if but is None else [_identity(details) for details in _refused(schema, but)]
    found = [details for details in _refused(schema, values) if _identity(details) not in known]
    return [_sentence(schema, details, where) for details in found]


def _refused(schema: type[Settings], values: Any) -> list[dict[str, Any]]:
    """Pydantic's errors."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return [details for each in error.errors() if not _is_echo(details := dict(each))]
    return []


def _identity(details: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for the same value refused for the same reason at the same place."""
    return details["loc"], details["type"], details["input"]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `name` may be a slip of, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _is_echo(details: dict[str, Any]) -> bool:
    """Whether another message covers it: a key that is not a text, a list left empty by bad entries."""
    kind, value = details["type"], details["input"]
    if kind == "invalid_key" or (details["loc"] and details["loc"][-1] == "[key]" and kind == "string_type"):
        return True
    return kind == "too_short" and len(value) != details["ctx"]["actual_length"]


def _sentence(schema: type[Settings], details: dict[str, Any], where: str) -> str:
    kind, value = details["type"], details["input"]
    path, field, siblings, known = _look_up(schema, details["loc"])
    path = plain(where + path)
    if kind == "extra_forbidden":
        return _unknown_key(path, siblings)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = details["ctx"]["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return _missing_tag(path, tag, known, named_by_user=field is None)
        path, value, field = f"{path}.{tag}", value[tag], None
    reason = f" ({field.description})" if field is not None and field.description else ""
    if kind == "missing":
        return f"`{path}` is missing: add it{reason}"
    if value is None:
        advice = "give it a value" if field is None or field.is_required() else "give it a value or leave the key out"
        return f"`{path}` is null, which is not allowed here: {advice}{reason}"
    context = details.get("ctx", {})
    if kind == "too_long":
        context = context | {"actual_length": len(value)}  # of a mapping pydantic does not say it
    rule = _RULES[kind].format(**context) if kind in _RULES else details["msg"]
    if isinstance(value, Mapping) and kind == "value_error":
        return f"`{path}` {rule}"
    return f"`{path}` is {shown(value)}: {rule}{reason}"


def _unknown_key(path: str, siblings: list[str]) -> str:
    hint = nearest(path.rpartition(".")[2], siblings)
    advice = f"did you mean `{hint}`?" if hint else "known here: " + ", ".join(siblings)
    return f"unknown key `{path}`; {advice}"


def _missing_tag(path: str, tag: str, known: list[type[Settings]], named_by_user: bool) -> str:
    names = [name for section in known for name in tags(section, tag)]
    hint = nearest(path.rpartition(".")[2], names) if named_by_user else None
    advice = f"did you mean `{hint}`?" if hint else f"add one of {', '.join(map(repr, names))}"
    return f"`{path}.{tag}` is missing: {advice}"


def _look_up(
    schema: type[Settings], location: tuple[Any, ...]
) -> tuple[str, FieldInfo | None, list[str], list[type[Settings]]]:
    """The dotted path of an error, its field, the keys known beside it, and the sections that may stand there.

    Pydantic's location also holds parts that are no keys of the recipe: which of several sections it is, "[key]", and
    the tags of `Layers`.
    """
    shown: list[str] = []
    here: Any = schema
    field: FieldInfo | None = None
    siblings: list[str] = []
    for part in location:
        sections = sections_of(here)
        if part in ("[key]", "[list]", "[auto]"):
            continue
        if len(sections) > 1:
            here = next(each for each in sections if any(part in tags(each, name) for name in each.model_fields))
        elif isinstance(part, int) and value_type(here) is None:  # a place in a list, and no key
            shown[-1] += f"[{part}]"
            here = None
        else:
            shown.append(str(part))
            fields = {n: f for n, f in sections[0].model_fields.items() if not f.exclude} if sections else {}
            siblings, field = list(fields), fields.get(part)
            here = field.annotation if field is not None else value_type(here)
    return ".".join(shown), field, siblings, sections_of(here)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."
