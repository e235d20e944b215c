"""Recipes that nobody means well with: each is read, or refused in one message, within seconds."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longred_megatron.errors import UserError
from longred_megatron.recipe import load_recipe
from longred_megatron.recipe.load import MAX_PROBLEMS

Write = Callable[..., Path]
SECONDS = 15  # a busy machine; most take a tenth of a second


def refused(path: Path | str, *overrides: str) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert time.monotonic() - started < SECONDS
    assert len(caught.value.problems) <= MAX_PROBLEMS + 1
    return str(caught.value)


LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True))

TEXTS = {
    "a billion laughs": ("a: &a [x, x]\n" + LAUGHS, "more than 50,000 values"),
    "an alias to itself": ("a: &a [*a]", "line 1, column 4: an alias leads to itself"),
    "a mapping of itself": ("a: &a {b: *a}", "an alias leads to itself"),
    "nested lists": ("[" * 100_000, "nested too deeply"),
    "nested mappings": ("{a: " * 5_000, "nested too deeply"),
    "nested a little too much": ("a: " + "[" * 60 + "]" * 60, "nested more than 40 deep"),
    "Python's objects": (
        "a: !!python/object/apply:os.system [touch pwned]",
        "python/object/apply:os.system' has no place",
    ),
    "Python's names": ("a: !!python/name:os.system", "has no place in a recipe"),
    "a tag of its own": ("a: !mine 1", "'!mine' has no place"),
    "a merge": ("a: &a {b: 1}\nmodel: {!!merge <<: *a}", "'tag:yaml.org,2002:merge' has no place"),
    "a merge key": ("a: &a {b: 1}\n<<: *a", "unknown key `<<`"),
    "a timestamp": ("a: !!timestamp 2020-01-01", "has no place in a recipe"),
    "a tag that lies": ("a: !!int x", "a value is not what its tag says"),
    "a truth that lies": ("a: !!bool x", "a value is not what its tag says"),
    "5,000 digits": (f"training: {{steps: {'9' * 5000}}}", "not valid YAML: a value is not"),
    "a number past doubles": (f"optimizer: {{lr: {'9' * 400}}}", "`optimizer.lr`"),
    "NUL": ('run: {dir: "a\\0b"}', "NUL or half of a surrogate pair"),
    "half a character": ('run: {dir: "\\ud800"}', "NUL or half of a surrogate pair"),
    "too long": ("a: " + "x" * 2**18, "bytes, more than the 262,144"),
    "a long list": (f"a: [{'1,' * 60_000}]", "more than 50,000 values"),
    "20,000 keys": ("\n".join(f"key{i}: 1" for i in range(20_000)), "and 19,9"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = TEXTS[name]
    assert expected in refused(write(text))
    assert not (tmp_path / "pwned").exists()


def test_paths_that_are_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "latin").write_bytes(b"a: \xff")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "of_fifo.yaml").write_text("base: fifo")
    for name, expected in {
        "fifo": "no file but a folder, a pipe or a device",
        "of_fifo.yaml": f"(the base of {tmp_path}/of_fifo.yaml)': cannot be read as a recipe (it is no file",
        ".": "no file but a folder, a pipe or a device",
        "/dev/zero": "no file but a folder, a pipe or a device",
        "file/x.yaml": "a folder of its path is a file",
        "latin": "not UTF-8 text: invalid start byte at byte 3",
        "dangling": "a link to nowhere, which does not exist",
        "loop": "a link of its path leads to itself",
        "x" * 300: "a name of its path is too long",
        "a\0b": "null",
    }.items():
        assert expected in refused(tmp_path / name), name


def test_a_chain_of_a_thousand_bases(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml")
    assert "0.yaml: more than 16 recipes, each the `base` of the one before" in refused(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.seed=18446744073709551616", "must be less than 4294967296"),
        ("training.steps=1000000000000000000", "must be at most 2147483647"),
        ("training.hang_minutes=1e18", "must be at most 525600"),
        ("model.max_position_embeddings=1000000000000000", "must be at most 1073741824"),
        ("objectives.long_text.microbatches=1000000000", "must be at most 100000"),
        ("objectives.long_text.weight=1e308", "must be at most 1e+20"),
        ("objectives.short_restoration.weight=1e308", "must be at most 1e+20"),
        ("objectives.short_restoration.layers=[" + "1," * 5000 + "]", "at most 1000 entries, has 5000"),
        ("optimizer.lr=1e200", "must be at most 1e+20"),
        ("optimizer.lr=1e-200", "must be at least 1e-20"),
        ("optimizer.eps=1e-320", "must be at least 1e-20"),
        ("optimizer.weight_decay=1e300", "must be at most 1e+20"),
        ("parallel.pipeline=1000000000", "must be at most 4096"),
        ("parallel.virtual_pipeline=1000000000", "must be at most 256"),
        ("parallel.layers_per_chunk=[" + "1," * 5000 + "]", "at most 4096 entries, has 5000"),
        ("data.long={a: 1e300}", "must be at most 1e+20"),
        ("data={" + ",".join(f"d{i}: {{a: 1}}" for i in range(300)) + "}", "must have at most 256 entries, has 303"),
        ("phases=[" + "{steps: 5}," * 1000 + "]", "must have at most 256 entries, has 1000"),
        ("precision.params=fp64", "must be 'bf16' or 'fp32'"),
        (".".join("a" * 100_000) + "=1", "must look like training.steps=100"),
        ("run.dir=" + "[" * 10_000, "nested too deeply"),
        ("run.dir=a\0b", "not valid YAML"),
        ("run.dir=\udcff", "not valid YAML"),
    ],
    ids=lambda text: text[:40].replace("\0", "NUL").encode("ascii", "replace").decode(),
)
def test_values(override: str, expected: str, write: Write, values: dict[str, Any]) -> None:
    message = refused(write(values), override)
    assert expected in message and len(message) < 2000


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    *("model", "model.hf", "model.rope", "model.rope.method", "model.rope.theta", "model.max_position_embeddings"),
    *("teacher", "teacher.hf", "step", "step.tokens_per_microbatch", "objectives", "objectives.long_text"),
    *("objectives.long_text.kind", "objectives.long_text.data", "objectives.short_restoration.layers"),
    *("objectives.short_to_long.positions", "objectives.mine", "data", "data.long", "parallel", "parallel.tensor"),
    *("parallel.layers_per_chunk", "precision", "precision.fp8", "optimizer.betas", "optimizer.lr", "training"),
    *(
        "training.trainable",
        "training.seed",
        "debug",
        "debug.dump_microbatches",
        "run",
        "run.dir",
        "phases",
        "base",
        "x",
    ),
]


@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=5000)
@example(key="model", value={"\n": None})
@given(key=st.sampled_from(KEYS), value=anything)
def test_any_value_at_any_key_loads_or_is_refused(key: str, value: Any, write: Write, values: dict[str, Any]) -> None:
    section = values = copy.deepcopy(values)
    *path, last = key.split(".")
    for name in path:
        section[name] = dict(section.get(name, {}))
        section = section[name]
    section[last] = value
    try:
        load_recipe(write(values))
    except UserError as error:
        assert all("\n" not in problem for problem in error.problems)
