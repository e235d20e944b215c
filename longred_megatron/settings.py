"""What every section of a recipe is made of: a closed, strict model, the types of its values, and marks on its fields.

A mark says what the rest of the program has to know of a key without knowing its name, so that a new key brings its
own: `Annotated[int, Mark.TOKENS]`.
"""

import pkgutil
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Mark(Enum):
    """What is special about a key."""

    PATH = "a path: relative ones are taken from the folder of the file that names them"
    PHASE = "a phase of a run may change it"
    FREE = "it may change between the parts of one run"
    OUTPUT = "where something is written beside the run: a rehearsal writes elsewhere"
    TOKENS = "a length in tokens: a rehearsal divides it"
    ENTRIES = "a number of entries of the vocabulary: a rehearsal has fewer"
    LAYERS = "layers of the model, numbered from 1: checked against its depth"


class Settings(BaseModel):
    """A section of the recipe: closed, read-only and without silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _not_empty(path: Path) -> Path:
    if path == Path():
        raise ValueError("must be a path, not an empty text")
    return path


def _not_tiny(value: float) -> float:
    if value < 1 / LARGEST_FLOAT:
        raise ValueError(f"must be at least {1 / LARGEST_FLOAT:g}")
    return value


LONGEST_TOKENS = 2**30
"""No window or sequence is longer: positions are also counted in 32 bits."""
LARGEST_FLOAT = 1e20
"""No number of a recipe is larger, and no positive one smaller than its inverse: products of two of them still fit
the range of fp32, in which losses and updates are computed."""

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NumRanks = Annotated[int, Field(ge=1, le=4096)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_FLOAT)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_FLOAT), AfterValidator(_not_tiny)]
NumTokens = Annotated[int, Field(ge=1, le=LONGEST_TOKENS), Mark.TOKENS]
RecipePath = Annotated[Path, Field(strict=False), AfterValidator(_not_empty), Mark.PATH]
"""Absolute once loaded: `load_recipe` takes relative ones from the folder of the file that names them."""


def renamed(values: Any, old: str, new: str, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """The values of a section with the key `old`, as recipes of earlier versions have it, under its name `new`.

    Raises ValueError when both are there.
    """
    if not isinstance(values, dict) or old not in values:
        return values
    rest = {key: value for key, value in values.items() if key != old}
    if values[old] is None:
        return rest
    if rest.get(new) is not None:
        raise ValueError(f"has {old} and {new}, which are one setting; remove {old}")
    return {**rest, new: convert(values[old])}


def marked_fields(section: type[Settings], mark: Mark) -> list[str]:
    """The keys of `section` itself that have `mark`."""
    return [name for name, field in section.model_fields.items() if mark in _marks(_annotated(field))]


def marked_keys(section: type[Settings], mark: Mark) -> Iterator[str]:
    """The dotted keys of `section` and the sections in it that have `mark`; a marked section stands for all in it."""
    for name, field in section.model_fields.items():
        if mark in _marks(_annotated(field)):
            yield name
            continue
        for inner in sections_of(field.annotation):
            yield from (f"{name}.{key}" for key in marked_keys(inner, mark))


def convert_marked(values: Any, annotation: Any, mark: Mark, convert: Callable[[Any], Any]) -> Any:
    """A copy of `values`, as YAML holds them, with `convert` applied to all values (and keys of mappings) with `mark`.

    annotation: the type of `values`: a section, or what stands at a field. Of several sections that a value may be, a
    key that has the mark in one has it in all. What does not fit the type is left as it is, for the schema to say.
    """
    if mark in _marks(annotation):
        return convert(values)
    sections = sections_of(annotation)
    if sections and isinstance(values, dict):
        types: dict[str, Any] = {}
        for name, field in (each for section in sections for each in section.model_fields.items()):
            types[name] = types[name] | _annotated(field) if name in types else _annotated(field)
        return {key: convert_marked(v, types.get(key), mark, convert) for key, v in values.items()}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return convert_marked(values, arguments[0], mark, convert)
    if origin in (Union, UnionType):
        converted = (convert_marked(values, each, mark, convert) for each in arguments)
        return next((new for new in converted if new != values), values)  # a value is one of them: converted once
    if origin is dict and isinstance(values, dict):
        keys = {key: convert_marked(key, arguments[0], mark, convert) for key in values}
        return {keys[key]: convert_marked(v, arguments[1], mark, convert) for key, v in values.items()}
    if origin is tuple and isinstance(values, list):
        each_type = arguments[:1] * len(values) if arguments[1:] == (...,) else (*arguments, *[None] * len(values))
        return [convert_marked(v, of, mark, convert) for v, of in zip(values, each_type, strict=False)]
    return values


def discovered[Section: Settings](package: str, path: list[str], base: type[Section], tag: str) -> list[type[Section]]:
    """The sub-classes of `base` in the modules of a package, in the order of their files; a new file is enough.

    tag: the field whose `Literal` values name a class, the same for all of them.

    Raises TypeError when two classes have one name.
    """
    found: list[type[Section]] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        for value in vars(import_module(f"{package}.{module}")).values():
            is_one = isinstance(value, type) and issubclass(value, base) and tag in value.model_fields
            if is_one and value.__module__ == f"{package}.{module}" and value not in found:
                found.append(value)
    names = [name for each in found for name in tags(each, tag)]
    if len(set(names)) < len(names):
        raise TypeError(f"{package}: two classes have one {tag} among {', '.join(names)}")
    return found


def tags(section: type[Settings], tag: str) -> tuple[str, ...]:
    """The values that the field `tag` of a discovered class may have."""
    annotation = section.model_fields[tag].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def sections_of(annotation: Any) -> list[type[Settings]]:
    """The sections that a value may be."""
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType):
        return [section for each in get_args(annotation) for section in sections_of(each)]
    return []


def value_type(annotation: Any) -> Any:
    """The type of a mapping's values; None where it is no mapping."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _annotated(field: FieldInfo) -> Any:
    """The type of a field with its marks, which pydantic takes off."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _marks(annotation: Any) -> set[Any]:
    """The marks of a type, also where it is one of several (`Path | None`)."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return {m for m in metadata if isinstance(m, Mark)} | _marks(inner)
    if get_origin(annotation) in (Union, UnionType):
        return {mark for each in get_args(annotation) for mark in _marks(each)}
    return set()
