import pytest
import yaml

from longred_megatron.recipe import recipe_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("2E5", 2e5),
        ("-1e+3", -1000.0),
        ("2.0e7", 2e7),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", float("inf")),
        ("131_072", 131072),
        ("+7", 7),
        ("0", 0),
        ("true", True),
        ("null", None),
        ("", None),
        # YAML 1.1 makes something else of these.
        ("010", "010"),
        ("1:30", "1:30"),
        ("off", "off"),
        ("no", "no"),
        ("0x1F", "0x1F"),
        ("2024-01-31", "2024-01-31"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_scalars(text: str, value: object) -> None:
    parsed, duplicates = recipe_yaml.parse(text)
    assert (parsed, type(parsed)) == (value, type(value))
    assert duplicates == []


def test_duplicate_keys_are_reported_with_both_lines() -> None:
    value, duplicates = recipe_yaml.parse("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert value == {"a": 3, "b": {"c": 2}}
    assert sorted(duplicates) == [
        "line 2: key `c` was already given in line 2; keep one",
        "line 3: key `a` was already given in line 1; keep one",
    ]


def test_dumped_texts_mean_the_same_to_a_yaml_1_1_reader() -> None:
    values = {"off": "1e5", "1:30": "010", "x": [2e-5, "null", 3]}
    assert yaml.safe_load(recipe_yaml.dump(values)) == values
    assert recipe_yaml.parse(recipe_yaml.dump(values))[0] == values


def test_key_that_is_no_text() -> None:
    assert recipe_yaml.key_problems({"a": {1: 2}, True: 3}) == [
        "`a.1`: key 1 is not a text; put it in quotes",
        "`True`: key True is not a text; put it in quotes",
    ]
