"""Marks on keys of a recipe, and classes that are found in the files of a folder."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from longred_megatron.settings import (
    Mark,
    NumTokens,
    RecipePath,
    Settings,
    convert_marked,
    discovered,
    marked_fields,
    marked_keys,
    renamed,
    sections_of,
    tags,
    value_type,
)


class Inner(Settings):
    length: NumTokens = 1
    path: Annotated[RecipePath, Mark.FREE] | None = None
    plain: int = 0


class Other(Settings):
    kind: Literal["other", "another"] = "other"
    length: int = 1  # a number of something else here
    path: RecipePath
    lengths: Annotated[tuple[NumTokens, ...], Field(min_length=2)] = (1, 2)


class One(Settings):
    kind: Literal["one"] = "one"
    where: RecipePath | None = None
    lengths: Annotated[tuple[NumTokens, ...], Field(max_length=2)] = (1,)


AnyOf = Annotated[One | Other, Field(discriminator="kind")]


class Whole(Settings):
    inner: Inner = Inner()
    marked: Annotated[Inner, Mark.PHASE, Mark.FREE] = Inner()
    either: Annotated[One | Inner | None, Field(description="x")] = None
    mine: dict[str, AnyOf] = Field(default_factory=dict)
    blends: Annotated[dict[str, dict[Annotated[str, Field(min_length=1), Mark.PATH], float]], Mark.PHASE] = Field(
        default_factory=dict
    )
    files: Annotated[tuple[RecipePath, ...], Field(strict=False), Mark.FREE] | None = None
    pair: tuple[RecipePath, int, RecipePath] | None = None
    plain: Annotated[int, Field(ge=0), Mark.PHASE, Mark.FREE] = 0
    text: str = ""


# Marks


def test_marked_fields_are_the_sections_own() -> None:
    assert marked_fields(Whole, Mark.PHASE) == ["marked", "blends", "plain"]
    assert marked_fields(Whole, Mark.FREE) == ["marked", "files", "plain"]
    assert marked_fields(Inner, Mark.PATH) == ["path"] == marked_fields(Inner, Mark.FREE)  # both, under a union
    assert marked_fields(Inner, Mark.TOKENS) == ["length"]
    assert marked_fields(Whole, Mark.PATH) == []  # in the paths of a tuple and in sections, but no key's own
    assert marked_fields(Whole, Mark.LAYERS) == []


def test_a_marked_section_stands_for_all_in_it() -> None:
    assert list(marked_keys(Whole, Mark.PHASE)) == ["marked", "blends", "plain"]
    assert list(marked_keys(Whole, Mark.FREE)) == ["inner.path", "marked", "either.path", "files", "plain"]
    assert list(marked_keys(Whole, Mark.TOKENS)) == ["inner.length", "marked.length", "either.length"]


# Values


def convert(values: Any, mark: Mark = Mark.PATH, annotation: Any = Whole) -> Any:
    """Each conversion is written down, so that two of one value show."""
    return convert_marked(values, annotation, mark, lambda value: f"<{value}>")


@pytest.mark.parametrize(
    ("values", "converted"),
    [
        ({"inner": {"path": "a", "plain": 1}, "text": "b"}, {"inner": {"path": "<a>", "plain": 1}, "text": "b"}),
        ({"inner": {"path": None}}, {"inner": {"path": "<None>"}}),  # the conversion's to know
        ({"either": {"path": "a", "where": "b"}}, {"either": {"path": "<a>", "where": "<b>"}}),
        ({"mine": {"path": {"path": "a", "where": "b"}}}, {"mine": {"path": {"path": "<a>", "where": "<b>"}}}),
        ({"blends": {"path": {"a": 1, "b": 2}}}, {"blends": {"path": {"<a>": 1, "<b>": 2}}}),
        ({"files": ["a", "b"]}, {"files": ["<a>", "<b>"]}),
        ({"files": []}, {"files": []}),
        ({"pair": ["a", "b", "c"]}, {"pair": ["<a>", "b", "<c>"]}),
        ({"pair": ["a", "b", "c", "d"]}, {"pair": ["<a>", "b", "<c>", "d"]}),  # too many: the schema's to say
        ({"pair": ["a"]}, {"pair": ["<a>"]}),
    ],
)
def test_all_values_with_a_mark_are_converted_once(values: Any, converted: Any) -> None:
    assert convert(values) == converted


@pytest.mark.parametrize(
    "values",
    [
        None,
        3,
        [],
        "a",
        {"inner": None, "either": None, "mine": None, "blends": None, "files": None},
        {"inner": "a", "either": "a", "mine": "a", "blends": "a", "files": "a", "pair": "a"},
        {"inner": ["a"], "either": ["a"], "mine": ["a"], "blends": ["a"], "pair": {"a": "b"}},
        {"mine": {"x": "a", "y": ["a"], "z": None}, "blends": {"x": "a", "y": None, "z": ["a"]}, "files": {"a": "b"}},
        {"unknown": {"path": "a"}, "path": "a", "inner": {"unknown": "a", "inner": {"path": "a"}}},
        {3: "a", None: {"path": "a"}},
    ],
)
def test_what_does_not_fit_the_type_is_left_alone(values: Any) -> None:
    assert convert(values) == values


def test_a_key_that_has_the_mark_in_one_section_has_it_in_all() -> None:
    several: dict[str, Any] = {"length": 8, "lengths": [8, 9]}
    assert convert({"either": several}, Mark.TOKENS) == {"either": {"length": "<8>", "lengths": ["<8>", "<9>"]}}
    # Both kinds have `lengths`, each with a rule of its own.
    assert convert({"mine": {"a": several}}, Mark.TOKENS) == {"mine": {"a": {"length": 8, "lengths": ["<8>", "<9>"]}}}


def test_a_marked_section_is_converted_as_one_value() -> None:
    assert convert({"marked": {"path": "a"}, "inner": {"path": "a"}}, Mark.PHASE) == {
        "marked": "<{'path': 'a'}>",
        "inner": {"path": "a"},
    }


def test_values_are_not_changed_in_place() -> None:
    values = {"inner": {"path": "a"}, "files": ["a"], "blends": {"x": {"a": 1}}}
    convert(values)
    assert values == {"inner": {"path": "a"}, "files": ["a"], "blends": {"x": {"a": 1}}}


def test_any_annotation_can_be_walked() -> None:
    path = Annotated[Path, Mark.PATH]
    assert convert("a", annotation=path) == convert("a", annotation=path | None) == "<a>"
    assert convert("a", annotation=Annotated[path, Field(description="x")] | int) == "<a>"
    assert convert({"a": ["b"]}, annotation=dict[str, tuple[path, ...]]) == {"a": ["<b>"]}
    assert convert(["a"], annotation=int | dict[str, path] | tuple[path, ...] | tuple[path, path]) == ["<a>"]
    assert convert({"a": "b"}, annotation=dict[path, path] | None) == {"<a>": "<b>"}
    assert convert({"a": "b"}, annotation=None) == {"a": "b"} == convert({"a": "b"}, annotation=Any)
    assert convert("a", annotation=int | str) == "a" == convert("a", annotation=Literal["a"])


# Names that keys had before


def test_an_old_name_stands_for_the_new_one() -> None:
    values = {"old": 2, "other": 3}
    assert renamed(values, "old", "new") == {"other": 3, "new": 2}
    assert renamed(values, "old", "new", lambda value: value == 1) == {"other": 3, "new": False}
    assert values == {"old": 2, "other": 3}
    assert renamed({"old": 2, "new": None}, "old", "new") == {"new": 2}
    assert renamed({"old": 0}, "old", "new") == {"new": 0}


def test_null_under_an_old_name_is_the_default() -> None:
    assert renamed({"old": None, "other": 3}, "old", "new") == {"other": 3}
    assert renamed({"old": None, "new": 4}, "old", "new") == {"new": 4}


@pytest.mark.parametrize("new", [2, 3, False, 0, []])
def test_both_names_are_a_problem_also_where_they_agree(new: Any) -> None:
    with pytest.raises(ValueError, match="has old and new, which are one setting; remove old"):
        renamed({"old": 2, "new": new}, "old", "new")


@pytest.mark.parametrize("values", [{"new": 1}, {}, None, "old", ["old"]])
def test_values_without_an_old_name_stay_the_same_object(values: Any) -> None:
    assert renamed(values, "old", "new") is values


# Sections of values


def test_sections_of() -> None:
    assert sections_of(Inner) == sections_of(Inner | None) == sections_of(Annotated[Inner, Mark.PHASE]) == [Inner]
    assert sections_of(AnyOf) == [One, Other] == sections_of(Annotated[One, "x"] | Annotated[Other | None, "y"])
    for none in (int, None, dict[str, Inner], tuple[Inner, ...], Literal["a"], Any, Annotated[int, Mark.PHASE]):
        assert sections_of(none) == []


def test_value_type() -> None:
    assert value_type(dict[str, Inner]) is Inner
    assert value_type(Annotated[Annotated[dict[str, int], "x"], Mark.PHASE]) is int
    for none in (Inner, int, None, tuple[int, ...], dict, Literal["a"]):
        assert value_type(none) is None


def test_tags_are_the_names_in_their_order() -> None:
    assert tags(One, "kind") == ("one",)
    assert tags(Other, "kind") == ("other", "another")
    assert tags(Other, "length") == ()


def test_sections_are_closed_read_only_and_strict() -> None:
    for values in ({"lenght": 1}, {"length": "1"}, {"length": True}, {"length": 1.0}, {"length": 0}, {"path": ""}):
        with pytest.raises(ValidationError):
            Inner.model_validate(values)
    with pytest.raises(ValidationError, match="frozen"):
        Inner().length = 2  # type: ignore[misc]


# Files of a folder


HEAD = "from typing import Literal\nfrom longred_megatron.settings import Settings\nfrom colours.base import Colour\n"
Drop = Callable[..., list[type[Settings]]]


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    """Writes files {name: content} into the package `colours`, and finds the colours that are in it then."""
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text(
        "from longred_megatron.settings import Settings\nclass Colour(Settings):\n    depth: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def drop(**files: str) -> list[type[Settings]]:
        for name, content in files.items():
            (folder / f"{name}.py").write_text(HEAD + content)
        for module in [name for name in sys.modules if name.split(".")[0] == "colours"]:
            del sys.modules[module]
        from colours.base import Colour  # type: ignore[import-not-found]

        return discovered("colours", [str(folder)], Colour, "tone")

    yield drop
    for module in [name for name in sys.modules if name.split(".")[0] == "colours"]:
        del sys.modules[module]


def colour(name: str, *tones: str, base: str = "Colour") -> str:
    return f"class {name}({base}):\n    tone: Literal[{', '.join(map(repr, tones))}] = {tones[0]!r}\n"


def names_of(found: list[type[Settings]]) -> list[str]:
    return [each.__name__ for each in found]


def test_a_file_dropped_into_a_package_is_found(drop: Drop) -> None:
    assert drop() == []  # not the class that they have in common
    assert names_of(drop(red=colour("Red", "red"))) == ["Red"]
    found = drop(blue=colour("Blue", "blue", "azure"))
    assert names_of(found) == ["Blue", "Red"]
    assert [tags(each, "tone") for each in found] == [("blue", "azure"), ("red",)]


def test_names_come_in_the_order_of_files_and_within_a_file_as_written(drop: Drop) -> None:
    found = drop(b=colour("Zinc", "zinc") + colour("Amber", "amber"), c=colour("Ash", "ash"), a=colour("Sky", "sky"))
    assert names_of(found) == ["Sky", "Zinc", "Amber", "Ash"]


def test_what_is_imported_or_has_no_name_is_no_other_class(drop: Drop) -> None:
    others = "Alias = Red\nclass Shared(Colour):\n    pass\n" + colour("Unrelated", "red", base="Settings")
    found = drop(
        red=colour("Red", "red") + others,
        scarlet="from colours.red import Red, Shared\n" + colour("Scarlet", "scarlet", base="Shared"),
        amber="from colours.scarlet import Scarlet\n",  # a file before the others, which has none of its own
    )
    assert names_of(found) == ["Red", "Scarlet"]


@pytest.mark.parametrize(
    "files",
    [
        {"red": colour("Red", "red"), "scarlet": colour("Scarlet", "red")},
        {"red": colour("Red", "red") + colour("Scarlet", "scarlet", "red")},
        {"red": colour("Red", "red") + "class Deeper(Red):\n    depth: int = 2\n"},  # it inherits the name
    ],
    ids=["two files", "one file", "a sub-class"],
)
def test_two_classes_of_one_name_are_an_error(drop: Drop, files: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"colours: two classes have one tone among red, "):
        drop(**files)
