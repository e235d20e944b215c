import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longred_megatron.errors import UserError, plain
from longred_megatron.recipe import Recipe, dump_recipe, load_recipe, phases_of

Write = Callable[..., Path]


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_defaults(write: Write, values: dict[str, Any]) -> None:
    recipe = load_recipe(write(values))
    assert recipe.teacher.hf == recipe.model.hf
    assert recipe.objectives["long_text"].weight == 1
    assert not recipe.objectives["long_text"].whole_sequences
    assert recipe.parallel.virtual_pipeline is None
    assert recipe.num_microbatches == 16
    names = ["long_text", "short_to_long", "short_restoration"]
    assert [(name, each.kind) for name, each in recipe.objectives.items()] == [(name, name) for name in names]


@pytest.mark.parametrize(
    ("rope", "method"),
    [(None, "none"), ("none", "none"), ({"method": "none"}, "none"), ({"method": "pi"}, "pi"), ("pi", "pi")],
)
def test_rope_forms(write: Write, values: dict[str, Any], rope: Any, method: str) -> None:
    del values["model"]["rope"]
    if rope is not None:
        values["model"]["rope"] = rope
    assert load_recipe(write(values)).model.rope.method == method


def test_recipe_is_read_only(write: Write, values: dict[str, Any]) -> None:
    recipe = load_recipe(write(values))
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.steps = 1  # type: ignore[misc]


# Inheritance


def test_child_is_merged_over_its_chain_of_bases(write: Write, values: dict[str, Any]) -> None:
    write(values, "a.yaml")
    write({"base": "a.yaml", "training": {"seed": 7}, "optimizer": {"betas": [0.8, 0.9]}}, "b.yaml")
    recipe = load_recipe(write({"base": "b.yaml", "training": {"steps": 3}}, "c.yaml"))
    assert (recipe.training.steps, recipe.training.seed) == (3, 7)
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.optimizer.lr == 2e-5


def test_null_removes_an_inherited_objective_data_set_and_teacher(write: Write, values: dict[str, Any]) -> None:
    write({**values, "teacher": {"hf": "t"}}, "a.yaml")
    child = {
        "base": "a.yaml",
        "objectives": {"short_to_long": None},
        "data": {"window": None},
        "teacher": None,
    }
    recipe = load_recipe(write(child))
    assert set(recipe.objectives) == {"long_text", "short_restoration"}
    assert set(recipe.data) == {"long", "short"}
    assert recipe.teacher.hf == recipe.model.hf


def test_a_blend_and_another_rope_method_are_replaced_whole(write: Write, values: dict[str, Any]) -> None:
    base = write(values, "a.yaml")
    child = {"base": "a.yaml", "model": {"rope": {"method": "pi", "factor": 4}}, "data": {"short": {"x": 1}}}
    recipe = load_recipe(write(child))
    assert recipe.model.rope.model_dump() == {"method": "pi", "factor": 4.0}
    assert recipe.data["short"] == {str(base.parent / "x"): 1.0}
    assert len(recipe.data) == 3
    theta = load_recipe(write({"base": "a.yaml", "model": {"rope": {"theta": 1e8}}})).model.rope
    assert theta.model_dump() == {"method": "abf", "theta": 1e8}


def test_circle_of_bases(write: Write, values: dict[str, Any]) -> None:
    write({**values, "base": "b.yaml"}, "a.yaml")
    write({"base": "c.yaml"}, "b.yaml")
    path = write({"base": "a.yaml"}, "c.yaml")
    (problem,) = problems_of(path)
    assert "`base` goes in a circle" in problem
    names = problem.partition("circle: ")[2].split(" -> ")
    assert [Path(name).name for name in names] == ["c.yaml", "a.yaml", "b.yaml", "c.yaml"]


def test_base_that_is_missing_or_no_path(write: Write, values: dict[str, Any]) -> None:
    write(values, "other.yaml")
    (problem,) = problems_of(write({"base": "othr.yaml"}, "a.yaml"))
    assert "othr.yaml (the base of " in problem
    assert "did you mean other.yaml?" in problem
    (problem,) = problems_of(write({**values, "base": ["other.yaml"]}, "b.yaml"))
    assert "`base` is ['other.yaml']: must be the path of one recipe" in problem


# Paths


def test_paths_are_relative_to_the_file_that_names_them(
    write: Write, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({**values, "debug": {"dump_microbatches": "../d"}}, "bases/a.yaml")
    child = write({"base": "../bases/a.yaml", "run": {"dir": "r"}, "data": {"long": {"x": 1}}}, "child/b.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(os.path.relpath(child), ["teacher.hf=t", "data.window={../w: 1}"])
    assert recipe.model.hf == tmp_path / "bases/m"
    assert recipe.debug.dump_microbatches == tmp_path / "d"
    assert recipe.run.dir == tmp_path / "child/r"
    assert recipe.teacher.hf == elsewhere / "t"
    assert recipe.data["long"] == {str(tmp_path / "child/x"): 1.0}
    assert recipe.data["window"] == {str(tmp_path / "w"): 1.0}
    assert list(recipe.data["short"]) == [str(tmp_path / "bases/s"), str(tmp_path / "bases/t")]


def test_home_folder(write: Write, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    values["model"]["hf"] = "~/m"
    assert load_recipe(write(values)).model.hf == Path("/somewhere/m")


# Overrides


def test_overrides(write: Write, values: dict[str, Any]) -> None:
    recipe = load_recipe(
        write(values),
        [
            "optimizer.lr=2e-6",
            "objectives.short_restoration.layers=[1, 2]",
            "parallel={tensor: 2, sequence: true}",
            "model.rope.factor=8",  # before the method it belongs to
            "model.rope.method=yarn",
            "objectives.short_to_long=null",
            "precision.params=fp32",
        ],
    )
    assert recipe.optimizer.lr == 2e-6
    assert recipe.objectives["short_restoration"].layers == (1, 2)
    assert (recipe.parallel.tensor, recipe.parallel.sequence) == (2, True)
    assert recipe.model.rope.model_dump()["factor"] == 8.0
    assert "short_to_long" not in recipe.objectives
    assert recipe.precision.params == "fp32"


@settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
@given(lr=st.floats(min_value=1e-20, max_value=1e20), steps=st.integers(1, 2**31 - 1))
@example(lr=1e-5, steps=1)
@example(lr=1e20, steps=10**9)
def test_any_number_python_prints_can_be_an_override(
    write: Write, values: dict[str, Any], lr: float, steps: int
) -> None:
    recipe = load_recipe(write(values), [f"optimizer.lr={lr!r}", f"training.steps={steps}"])
    assert (recipe.optimizer.lr, recipe.training.steps) == (lr, steps)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training.steps"],
            "override 'training.steps': must look like training.steps=100 (section.key=value)",
        ),
        (["--training.steps=3"], "override '--training.steps=3': must look like training.steps=100"),
        (["training..steps=3"], "override 'training..steps=3': must look like"),
        (["training.steps=3", "training.steps=4"], "override `training.steps` is given twice; keep one"),
        (["base=x.yaml"], "override `base`: a base cannot be given on the command line"),
        (
            ["data.long.x=1"],
            "override `data.long.x`: a blend is set as a whole: data.long={PREFIX: WEIGHT, ...}",
        ),
        (["training.steps=[1"], "override 'training.steps=[1': not valid YAML: line 1"),
        (["training={steps: 1, steps: 2}"], "key `steps` was already given in line 1"),
        (["trainig.steps=3"], "unknown key `trainig`; did you mean `training`?"),
        (["training.steps="], "`training.steps` is null, which is not allowed here: give it a value"),
    ],
)
def test_bad_overrides(write: Write, values: dict[str, Any], overrides: list[str], expected: str) -> None:
    (problem,) = problems_of(write(values), *overrides)
    assert expected in problem


# Files


def test_files_that_are_no_recipe(write: Write, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "none.yaml")
    assert problem == f"{tmp_path}/none.yaml: no such recipe"
    write("a: 1", "recipe_a.yaml")
    assert problems_of(tmp_path / "recipe_b.yaml")[0].endswith("did you mean recipe_a.yaml?")
    assert "cannot be read as a recipe" in problems_of(tmp_path)[0]
    assert "this file is empty" in problems_of(write("# nothing\n"))[0]
    assert "this file is a list" in problems_of(write("- 1\n"))[0]
    (problem,) = problems_of(write("model: {hf: x\nstep: 3\n"))
    assert "recipe.yaml: not valid YAML: line 2, column 5: expected ',' or '}'" in problem
    assert "not valid YAML: line 2" in problems_of(write("a: 1\n[1]: 2\n", "key.yaml"))[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a recipe" in problems_of(tmp_path / "binary.yaml")[0]


# Objectives


MINE = {"microbatches": 3, "sequence_length": 512, "data": "short"}


def test_two_objectives_of_one_kind_under_names_of_their_own(write: Write, values: dict[str, Any]) -> None:
    values["objectives"] |= {
        "code": MINE | {"kind": "next_token", "weight": 0.5},
        "deep": values["objectives"]["short_restoration"] | {"kind": "short_restoration", "layers": [31]},
    }
    recipe = load_recipe(write(values))
    kinds = {name: each.kind for name, each in recipe.objectives.items()}
    named = ("long_text", "short_to_long", "short_restoration")
    assert kinds == {name: name for name in named} | {"code": "next_token", "deep": "short_restoration"}
    assert list(kinds) == [*named, "code", "deep"]  # in the order of the file
    assert type(recipe.objectives["code"]) is type(recipe.objectives["long_text"])
    assert recipe.objectives["deep"] != recipe.objectives["short_restoration"]
    assert recipe.num_microbatches == 16 + 3 + 6
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_a_name_that_is_a_kind_may_stand_for_another(write: Write, values: dict[str, Any]) -> None:
    values["objectives"]["short_restoration"] = MINE | {"kind": "long_text"}
    assert load_recipe(write(values)).objectives["short_restoration"].kind == "long_text"


def test_an_objective_whose_kind_changes_is_replaced_whole(write: Write, values: dict[str, Any]) -> None:
    values["objectives"]["mine"] = MINE | {"kind": "packed_distillation", "top_k": 7, "weight": 3}
    write(values, "a.yaml")

    def child(name: str, **own: Any) -> Recipe:
        return load_recipe(write({"base": "a.yaml", "objectives": {name: own}}, "b.yaml"))

    replaced = child("mine", kind="next_token", **MINE | {"microbatches": 9}).objectives["mine"]
    assert (replaced.kind, replaced.microbatches, replaced.weight) == ("next_token", 9, 1)
    # A kind that is not said is the name's own.
    assert child("long_text", kind="next_token", **MINE).objectives["long_text"].sequence_length == 512
    for same in ({"kind": "packed_distillation"}, {}):
        merged = child("mine", microbatches=9, **same).objectives["mine"]
        assert (merged.microbatches, merged.weight, merged.top_k) == (9, 3, 7)
    assert child("long_text", kind="long_text", microbatches=9).objectives["long_text"].sequence_length == 32768
    found = problems_of(write({"base": "a.yaml", "objectives": {"mine": {"kind": "next_token"}}}, "c.yaml"))
    assert [problem.split(":")[0] for problem in found] == [
        f"`objectives.mine.{key}` is missing" for key in ("microbatches", "sequence_length", "data")
    ]
    overridden = load_recipe(
        write(values), ["objectives.mine={kind: next_token, microbatches: 1, sequence_length: 8, data: short}"]
    )
    assert overridden.objectives["mine"].weight == 1


def test_a_phase_may_change_a_kind(write: Write, values: dict[str, Any]) -> None:
    values["objectives"]["mine"] = MINE | {"kind": "packed_distillation", "top_k": 7}
    values["phases"] = [
        {},
        {"objectives": {"mine": MINE | {"kind": "next_token"}, "code": MINE | {"kind": "long_text"}}},
    ]
    first, second = phases_of(load_recipe(write(values)))
    assert (first.objectives["mine"].kind, second.objectives["mine"].kind) == ("packed_distillation", "next_token")
    assert "code" not in first.objectives and second.objectives["code"].kind == "long_text"


def test_a_number_is_no_name(write: Write, values: dict[str, Any]) -> None:
    values["objectives"][3] = MINE
    key, kind = problems_of(write(values))
    assert key == "`objectives.3`: key 3 is not a text; put it in quotes"
    assert kind.startswith("`objectives.3.kind` is missing: add one of 'next_token', ")


@pytest.mark.parametrize("name", ["long/text", "long.text", "long text", "long_text\n", "längst", ""])
def test_names_that_are_no_part_of_a_metric(write: Write, values: dict[str, Any], name: str) -> None:
    values["objectives"][name] = MINE | {"kind": "next_token"}
    (problem,) = problems_of(write(values))
    assert problem.startswith(f"`{plain(f'objectives.{name}')}` is {name!r}: must be letters, digits, _ and -")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (MINE, "`objectives.mine.kind` is missing: add one of 'next_token', 'long_text', "),
        ({}, "`objectives.mine.kind` is missing: add one of"),
        (
            MINE | {"kind": "long_txt"},
            "`objectives.mine.kind` is 'long_txt': must be one of 'next_token', 'long_text', ",
        ),
        (MINE | {"kind": None}, "`objectives.mine.kind` is null, which is not allowed here: give it a value"),
        (3, "`objectives.mine` is 3: must be a mapping (key: value)"),
        (MINE | {"kind": "next_token", "wieght": 1}, "unknown key `objectives.mine.wieght`; did you mean `weight`?"),
        (
            MINE | {"kind": "next_token", "layers": [1]},
            "unknown key `objectives.mine.layers`; known here: microbatches, sequence_length, data, weight, "
            "whole_sequences, teacher, kind, mask_documents",  # no old name of a key
        ),
        (MINE | {"kind": "short_to_long", "weight": 1}, "`objectives.mine.positions` is missing: add it (how the"),
        (MINE | {"kind": "next_token", "teacher": {}}, "`objectives.mine.teacher.hf` is missing: add it"),
        (MINE | {"kind": "next_token", "teacher": "t"}, "`objectives.mine.teacher` is 't': must be a mapping"),
    ],
)
def test_objective_messages(write: Write, values: dict[str, Any], own: Any, expected: str) -> None:
    values["objectives"]["mine"] = own
    (problem,) = problems_of(write(values))
    assert problem.startswith(expected)


def test_a_teacher_of_an_objective_is_relative_to_the_file_that_names_it(
    write: Write, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["teacher"] = {"hf": "t"}
    values["objectives"]["short_to_long"]["teacher"] = {"hf": "../own"}
    values["objectives"]["long_text"]["teacher"] = {"hf": "a"}
    write(values, "bases/a.yaml")
    child = {
        "base": "../bases/a.yaml",
        "objectives": {"long_text": {"teacher": {"hf": "b"}}},
        "phases": [{"objectives": {"short_restoration": {"teacher": {"hf": "c"}}, "short_to_long": {"teacher": None}}}],
    }
    path = write(child, "child/b.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(path)
    teachers = {name: recipe.teacher_of(name).hf for name in recipe.objectives}
    assert teachers == {
        "long_text": tmp_path / "child/b",
        "short_to_long": tmp_path / "own",
        "short_restoration": tmp_path / "bases/t",
    }
    [phase] = phases_of(recipe)
    assert phase.teacher_of("short_restoration").hf == tmp_path / "child/c"
    assert phase.teacher_of("short_to_long").hf == tmp_path / "bases/t"  # null: the recipe's again
    assert phase.teacher_of("long_text").hf == tmp_path / "child/b"
    overrides = [
        "objectives.long_text.teacher=null",
        "objectives.short_to_long.teacher.hf=../d",
        "phases.0.objectives.short_restoration.teacher.hf=e",
    ]
    overridden = load_recipe(path, overrides)
    assert overridden.objectives["long_text"].teacher is None
    assert overridden.teacher_of("long_text").hf == tmp_path / "bases/t"
    assert overridden.teacher_of("short_to_long").hf == tmp_path / "d"
    assert phases_of(overridden)[0].teacher_of("short_restoration").hf == elsewhere / "e"
    assert load_recipe(write(dump_recipe(overridden), "dumped.yaml")) == overridden


# Names that keys had before


@pytest.mark.parametrize(("ranks", "whole"), [(1, True), (None, False), (4, False)])
def test_context_parallel_is_the_old_name_of_whole_sequences(
    write: Write, values: dict[str, Any], ranks: int | None, whole: bool
) -> None:
    values["parallel"] = {"context": 4}
    values["objectives"]["long_text"]["context_parallel"] = ranks
    recipe = load_recipe(write(values))
    assert recipe.objectives["long_text"].whole_sequences is whole
    text = dump_recipe(recipe)
    assert "context_parallel:" not in text
    again = load_recipe(write(text, "dumped.yaml"))
    assert dump_recipe(again) == text and again.objectives["long_text"].whole_sequences is whole


def test_layers_per_stage_is_the_old_name_of_layers_per_chunk(write: Write, values: dict[str, Any]) -> None:
    recipe = load_recipe(write(values), ["parallel={pipeline: 2, layers_per_stage: [15, 17]}"])
    assert recipe.parallel.layers_per_chunk == (15, 17)
    assert "layers_per_stage:" not in dump_recipe(recipe)
    assert load_recipe(write(dump_recipe(recipe), "dumped.yaml")) == recipe
    assert load_recipe(write(values), ["parallel.layers_per_stage=null"]).parallel.layers_per_chunk is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objectives.short_to_long.context_parallel=1"],  # where whole_sequences is true, as it says
            "`objectives.short_to_long` has context_parallel and whole_sequences, which are one setting; remove "
            "context_parallel",
        ),
        (
            ["objectives.long_text={context_parallel: 1, whole_sequences: false}"],
            "`objectives.long_text` has context_parallel and whole_sequences",
        ),
        (
            ["objectives.long_text.context_parallel=0"],
            "`objectives.long_text.context_parallel` is 0: must be at least 1",
        ),
        (["objectives.long_text.context_parallel=true"], "`objectives.long_text.context_parallel` is true: must be a "),
        (
            ["objectives.long_text.contxt_parallel=1"],
            "unknown key `objectives.long_text.contxt_parallel`; known here: ",
        ),
        (
            ["parallel={pipeline: 2, layers_per_stage: [16, 16], layers_per_chunk: [16, 16]}"],
            "`parallel` has layers_per_stage and layers_per_chunk, which are one setting; remove layers_per_stage",
        ),
        (["parallel.layers_per_stage=[0]"], "`parallel.layers_per_chunk[0]` is 0: must be at least 1"),
    ],
)
def test_bad_values_under_old_names(write: Write, values: dict[str, Any], overrides: list[str], expected: str) -> None:
    (problem,) = problems_of(write(values), *overrides)
    assert problem.startswith(expected)


# Messages


def test_everything_that_is_wrong_comes_in_one_message(write: Write, values: dict[str, Any]) -> None:
    values["model"] |= {"rope": {"method": "abf", "theta": -1, "factr": 2}, "max_position_embeddings": 0.5}
    values["objectives"]["long_txt"] = {}
    values["objectives"]["long_text"]["data"] = None
    values["objectives"]["short_to_long"] |= {"positions": "creme", "whole_sequences": 1}
    values["objectives"]["short_restoration"]["layers"] = ["a"]
    values["data"] = {"long": {}, "short": 3, "window": {"": 1, "x": "1", 2: 1}}
    values["optimizer"] = {"betas": [1, 0.9], "lr": float("nan"), "eps": "1"}
    values["training"] = {"stps": 1}
    values["parallel"] = {"virtual_pipeline": 1}
    values["run"] = {"dir": ""}
    values["phases"] = []
    path = write(values)
    path.write_text(path.read_text() + "step: {tokens_per_microbatch: 65536}\n")
    folder = path.parent
    expected = [
        "key `step` was already given in line",
        "`data.window.2`: key 2 is not a text; put it in quotes",
        "`model.rope.theta` is -1: must be greater than 0 (RoPE base",
        "unknown key `model.rope.factr`; known here: method, theta",
        "`model.max_position_embeddings` is 0.5: must be a whole number (target window, in tokens)",
        "`objectives.long_text.data` is null, which is not allowed here: give it a value (name of",
        "`objectives.short_to_long.whole_sequences` is 1: must be true or false (whether each",
        "`objectives.short_to_long.positions` is 'creme': must be 'cream', 'uniform' or 'natural'",
        "`objectives.short_restoration.layers[0]` is 'a': must be a whole number",
        "`objectives.long_txt.kind` is missing: did you mean `long_text`?",
        "`data.long` is {}: must have at least 1 entries, has 0",
        "`data.short` is 3: must be a mapping (key: value)",
        "`data.window.` is '': must not be empty",
        f"`data.window.{folder}/x` is '1': must be a number",
        "`parallel.virtual_pipeline` is 1: must be at least 2",
        "`optimizer.lr` is nan: must be a finite number (peak learning rate)",
        "`optimizer.betas[0]` is 1: must be less than 1",
        "`optimizer.eps` is '1': must be a number",
        "`training.steps` is missing: add it (optimizer steps)",
        "unknown key `training.stps`; did you mean `steps`?",
        "`run.dir` is '': must be a path, not an empty text",
        "`phases` is []: must have at least 1 entries, has 0",
    ]
    found = problems_of(path)
    for text in expected:
        assert sum(text in problem for problem in found) == 1, (text, found)
    assert len(found) == len(expected), found


ROPES = "'abf', 'dynamic', 'longrope', 'none', 'pi', 'yarn'"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"method": "abff"}, f"`model.rope.method` is 'abff': must be one of {ROPES}"),
        ({"theta": 2e7}, f"`model.rope.method` is missing: add one of {ROPES}"),
        (3, "`model.rope` is 3: must be a mapping (key: value)"),
        ("abff", f"`model.rope.method` is 'abff': must be one of {ROPES}"),
        ("abf", "`model.rope.theta` is missing: add it (RoPE base"),
        ({"method": "abf"}, "`model.rope.theta` is missing: add it (RoPE base"),
        (
            {"method": "longrope", "short_factor": [1], "long_factor": ["a"]},
            "`model.rope.long_factor[0]` is 'a': must be a number (",
        ),
        ({"method": "yarn", "factor": 1}, "`model.rope.factor` is 1: must be greater than 1"),
        ({"method": "none", "theta": 1}, "unknown key `model.rope.theta`; known here: method"),
    ],
)
def test_rope_messages(write: Write, values: dict[str, Any], rope: Any, expected: str) -> None:
    values["model"]["rope"] = rope
    (problem,) = problems_of(write(values))
    assert problem.startswith(expected)


@pytest.mark.parametrize("objectives", [{}, {"long_text": None}, {"long_text": None, "mine": None}])
def test_no_objective(write: Write, values: dict[str, Any], objectives: dict[str, Any]) -> None:
    (problem,) = problems_of(write({**values, "objectives": objectives}))
    assert problem.startswith("`objectives` needs at least one objective; add one of next_token, long_text,")
    assert problem == problems_of(write({**values, "objectives": dict.fromkeys(values["objectives"])}))[0]


def test_a_child_without_objectives_of_its_own_has_its_bases(write: Write, values: dict[str, Any]) -> None:
    base = load_recipe(write(values, "a.yaml"))
    assert load_recipe(write({"base": "a.yaml", "objectives": {}}, "b.yaml")).objectives == base.objectives
    fewer = load_recipe(write({"base": "a.yaml", "objectives": {"long_text": None, "not_there": None}}, "c.yaml"))
    assert list(fewer.objectives) == ["short_to_long", "short_restoration"]
    (problem,) = problems_of(write({"base": "a.yaml", "objectives": dict.fromkeys(values["objectives"])}, "d.yaml"))
    assert problem.startswith("`objectives` needs at least one objective")


def test_null_section_that_has_a_default(write: Write, values: dict[str, Any]) -> None:
    (problem,) = problems_of(write({**values, "parallel": None}))
    assert problem.startswith("`parallel` is null, which is not allowed here: give it a value or leave the key out")


# Round trip

names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
) | st.sampled_from(["1e5", "off", "null", "~", "010", "1:30", "2024-01-31", "true", "-", "a: b", "#", "x" * 200])
path_text = names.map(lambda name: os.path.abspath(f"/{name}"))  # as loading leaves them: /a/../b is /b
positive = st.floats(min_value=1e-20, max_value=1e20)
count = st.integers(min_value=1, max_value=100_000)
common = {
    "microbatches": count,
    "sequence_length": count,
    "data": names,
    "weight": positive,
    "whole_sequences": st.booleans(),
    "teacher": st.none() | st.fixed_dictionaries({"hf": path_text}),
}
objectives = st.fixed_dictionaries(
    {"long_text": st.fixed_dictionaries(common)},
    optional={
        "mine": st.fixed_dictionaries(
            common | {"kind": st.just("next_token")}, optional={"mask_documents": st.booleans()}
        ),
        "short_to_long": st.none()
        | st.fixed_dictionaries(common | {"positions": st.sampled_from(["cream", "uniform", "natural"])}),
        "short_restoration": st.fixed_dictionaries(common | {"layers": st.lists(st.integers(-3, 99), min_size=1)}),
    },
)
rope = st.one_of(
    st.just("none"),
    st.fixed_dictionaries({"method": st.just("abf"), "theta": positive}),
    st.fixed_dictionaries({"method": st.just("pi")}, optional={"factor": st.floats(1.5, 1e20)}),
    st.fixed_dictionaries(
        {"method": st.just("yarn")},
        optional={"beta_fast": positive, "attention_factor": st.none() | positive},
    ),
    st.fixed_dictionaries({"method": st.just("dynamic")}, optional={"factor": st.floats(1, 1e20)}),
    st.fixed_dictionaries(
        {
            "method": st.just("longrope"),
            "short_factor": st.lists(positive, min_size=1, max_size=4),
            "long_factor": st.lists(positive, min_size=1, max_size=4),
        },
        optional={"attention_factor": positive},
    ),
)
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"hf": path_text, "rope": rope, "max_position_embeddings": count}),
        "step": st.fixed_dictionaries({"tokens_per_microbatch": count}),
        "objectives": objectives,
        "data": st.dictionaries(
            names,
            st.dictionaries(path_text, positive, min_size=1, max_size=3),
            max_size=3,
        ),
        "optimizer": st.fixed_dictionaries(
            {"lr": positive}, optional={"betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2)}
        ),
        "training": st.fixed_dictionaries({"steps": count}),
        "run": st.fixed_dictionaries({"dir": path_text}),
    },
    optional={
        "teacher": st.fixed_dictionaries({"hf": path_text}),
        "precision": st.fixed_dictionaries({"fp8": st.sampled_from([None, "hybrid"])}),
        "debug": st.fixed_dictionaries({"dump_microbatches": st.none() | path_text}),
    },
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(content=recipes)
def test_dumped_recipe_loads_as_an_equal_one(tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(content)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_dump_writes_out_defaults(write: Write, values: dict[str, Any]) -> None:
    del values["objectives"]["short_to_long"]
    del values["data"]["window"]
    text = dump_recipe(load_recipe(write(values)))
    assert "short_to_long" not in text
    assert "checkpoint_every_steps: 64" in text
    assert "layers: [1, 9, 32]" in text
