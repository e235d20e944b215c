"""`phases:` of a recipe: merging, messages, overrides, round trip, checks and the start-up summary."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.planning.summary import phases_summary
from longred_megatron.recipe import (
    Recipe,
    check_phases,
    dump_recipe,
    load_recipe,
    phases_of,
    read_phases,
)
from longred_megatron.recipe import phases as phases_module

Write = Callable[..., Path]
ABF = {"model": {"rope": {"theta": 1e6}}, "optimizer": {"lr": 1e-4, "warmup_steps": 5}, "training": {"steps": 100}}
PI = {
    "model": {"rope": {"method": "pi"}, "max_position_embeddings": 65536},
    "objectives": {"short_to_long": None, "long_text": {"sequence_length": 65536, "data": "longer"}},
    "data": {"longer": {"x": 1}, "short": {"y": 1}, "window": None},
    "training": {"recompute": "none"},
}


@pytest.fixture
def read(write: Write, values: dict[str, Any]) -> Callable[..., Recipe]:
    def read(phases: Any, *overrides: str) -> Recipe:
        return load_recipe(write({**values, "phases": phases}), overrides)

    return read


@pytest.fixture
def problems(read: Callable[..., Recipe]) -> Callable[..., list[str]]:
    def problems(phases: Any, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            read(phases, *overrides)
        return caught.value.problems

    return problems


def test_each_phase_is_merged_over_the_recipe_as_a_child_over_its_base(read: Callable[..., Recipe]) -> None:
    recipe = read([ABF, PI])
    first, second = phases_of(recipe)
    assert first.model.rope.model_dump() == {"method": "abf", "theta": 1e6}
    assert (first.optimizer.lr, first.optimizer.warmup_steps, first.training.steps) == (1e-4, 5, 100)
    assert first.objectives == recipe.objectives and first.data == recipe.data
    # The recipe's values and not those of the phase before.
    assert (second.optimizer, second.training.steps) == (recipe.optimizer, 512)
    assert second.model.rope.model_dump() == {"method": "pi", "factor": None}
    assert list(second.objectives) == ["long_text", "short_restoration"]
    assert second.objectives["long_text"].microbatches == 8
    assert {name: [Path(p).name for p in blend] for name, blend in second.data.items()} == {
        "long": ["l"],
        "short": ["y"],
        "longer": ["x"],
    }
    assert first.phases is None and second.run == recipe.run


@pytest.fixture
def config(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> dict[str, Architecture]:
    """What `read_architecture` finds, by the name of a model's folder; `architecture` in all others."""
    found: dict[str, Architecture] = {}
    monkeypatch.setattr(phases_module, "read_architecture", lambda hf: found.get(hf.name, architecture))
    return found


def test_a_recipe_without_phases_is_one(read: Callable[..., Recipe], config: dict[str, Architecture]) -> None:
    recipe = read(None)
    assert recipe.phases is None and phases_of(recipe) == [recipe]
    [phase] = read_phases(recipe.model_copy(update={"objectives": read(None, *ONLY_LONG_TEXT).objectives}))
    assert (phase.number, phase.steps_before, phase.last_step) == (1, 0, 512)


ONLY_LONG_TEXT = ("objectives.short_to_long=null", "objectives.short_restoration=null")


def test_steps_and_tokens_are_counted_over_the_run(
    read: Callable[..., Recipe], config: dict[str, Architecture]
) -> None:
    recipe = read([ABF, {"step": {"tokens_per_microbatch": 32768}}], *ONLY_LONG_TEXT)
    first, second = read_phases(recipe)
    assert (first.last_step, second.steps_before, second.last_step) == (100, 100, 612)
    assert second.tokens_before == 100 * 8 * 65536
    assert second.last_token == 100 * 8 * 65536 + 512 * 8 * 32768


def test_a_childs_phases_replace_its_bases_and_their_paths_are_relative_to_their_file(
    write: Write, values: dict[str, Any], tmp_path: Path
) -> None:
    change = {"teacher": {"hf": "t"}, "data": {"short": {"../y": 1}}}
    write({**values, "phases": [change]}, "bases/a.yaml")
    inherited = load_recipe(write({"base": "bases/a.yaml"}, "b.yaml"))
    [phase] = phases_of(inherited)
    assert phase.teacher.hf == tmp_path / "bases/t" and list(phase.data["short"]) == [str(tmp_path / "y")]
    replaced = load_recipe(write({"base": "bases/a.yaml", "phases": [{}, ABF]}, "c.yaml"))
    assert [phase.training.steps for phase in phases_of(replaced)] == [512, 100]
    assert phases_of(replaced)[0].teacher == inherited.teacher
    assert load_recipe(write({"base": "bases/a.yaml", "phases": None}, "d.yaml")).phases is None


def test_overrides(read: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read(
        [ABF, PI],
        "optimizer.lr=3e-4",  # the recipe's: the first phase has its own
        "phases.0.training.steps=2",
        "phases.0.objectives.short_to_long=null",
        "phases.1.model.rope.factor=8",
        "phases.1.data.short={z: 1}",
        "phases.1.objectives.long_text=null",
    )
    first, second = phases_of(recipe)
    assert (first.optimizer.lr, second.optimizer.lr) == (1e-4, 3e-4)
    assert (first.training.steps, second.training.steps) == (2, 512)
    assert second.model.rope.model_dump() == {"method": "pi", "factor": 8.0}
    assert list(second.data["short"]) == [str(tmp_path / "z")]
    assert list(first.objectives) == ["long_text", "short_restoration"]
    # Null removes what the recipe has, also where the phase has changes to it.
    assert list(second.objectives) == ["short_restoration"]
    assert read([ABF, PI], "phases=null").phases is None
    one = read([ABF, PI], "phases.0.training.steps=7", "phases=[{optimizer: {lr: 1e-3}}]")
    assert [(p.optimizer.lr, p.training.steps) for p in phases_of(one)] == [(1e-3, 7)]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("phases.2.training.steps=1", "override `phases.2`: the recipe has phases 0 to 1"),
        ("phases.-1.training.steps=1", "override `phases.-1`: the recipe has phases 0 to 1"),
        ("phases.one.training.steps=1", "override `phases.one`: the recipe has phases 0 to 1"),
        ("phases.1.parallel.tensor=2", "`phases[1].parallel` is the same for the whole run: a phase may change model."),
        ("phases.1.training.steps=0", "`phases[1].training.steps` is 0: must be at least 1"),
        ("phases.1=null", "`phases[1]` is null"),
        ("phases.1.data.long.x=1", "a blend is set as a whole: phases.1.data.long={PREFIX: WEIGHT, ...}"),
        ("phases.0.trainig.steps=1", "unknown key `phases[0].trainig`; did you mean `training`?"),
        ("optimizer.lr=-1", "`optimizer.lr` is -1: must be greater than 0"),  # once, though a phase inherits it
    ],
)
def test_bad_overrides(problems: Callable[..., list[str]], override: str, expected: str) -> None:
    [problem] = problems([ABF, PI], override)
    assert expected in problem


def test_override_without_phases(problems: Callable[..., list[str]]) -> None:
    assert problems(None, "phases.0.training.steps=1") == ["override `phases.0`: the recipe has no phases"]


def test_all_problems_of_all_phases_come_in_one_message(problems: Callable[..., list[str]]) -> None:
    phases = [
        {"optimizer": {"lr": -1}, "model": {"hf": "x", "rope": {"thetta": 1}}},
        {"parallel": {"tensor": 2}, "training": {"seed": 1}, "phases": [{}], "objectives": {"long_text": None}},
        {"objectives": {"long_txt": {}}, "data": {"short": {3: 1}}, "model": {"rope": {"method": "abff"}}},
        {"objectives": dict.fromkeys(("long_text", "short_to_long", "short_restoration"))},
        7,
    ]
    found = problems(phases, "precision.params=fp8")
    expected = [
        "`precision.params` is 'fp8': must be 'bf16' or 'fp32'",
        "`phases[0].optimizer.lr` is -1: must be greater than 0 (peak learning rate)",
        "`phases[0].model.hf` is the same for the whole run",
        "unknown key `phases[0].model.rope.thetta`; did you mean `theta`?",
        "`phases[1].parallel` is the same for the whole run",
        "`phases[1].training.seed` is the same for the whole run",
        "`phases[1].phases` is the same for the whole run",
        "`phases[2].data.short.3`: key 3 is not a text",
        "`phases[2].objectives.long_txt.kind` is missing: did you mean `long_text`?",
        "`phases[2].model.rope.method` is 'abff': must be one of",
        "`phases[3].objectives` needs at least one objective",
        "`phases[4]` is 7: must be a mapping",
    ]
    for text in expected:
        assert sum(text in problem for problem in found) == 1, (text, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize("phases", [{"0": {}}, 3, "x"])
def test_phases_that_are_no_list(problems: Callable[..., list[str]], phases: Any) -> None:
    [problem] = problems(phases)
    assert problem.startswith("`phases` is ") and "must be a list" in problem


def test_dumped_recipe_loads_as_an_equal_one(read: Callable[..., Recipe], write: Write) -> None:
    recipe = read([{**ABF, "teacher": {"hf": "t"}, "model": {"rope": "none"}}, PI, {}])
    again = load_recipe(write(dump_recipe(recipe), "elsewhere/resolved.yaml"))
    assert again == recipe and phases_of(again) == phases_of(recipe)


@pytest.fixture
def check(read: Callable[..., Recipe], config: dict[str, Architecture]) -> Callable[..., list[str]]:
    def check(phases: Any, *overrides: str, world_size: int = 1) -> list[str]:
        return check_phases(read_phases(read(phases, *overrides)), world_size, gpu=False)

    return check


def test_checks_name_the_phase(check: Callable[..., list[str]]) -> None:
    assert check([ABF, PI]) == []
    found = check([ABF, {"model": {"rope": {"theta": 5e5}}}, {"optimizer": {"min_lr": 1}}])
    assert len(found) == 3 and found[0].startswith("phases[1]: `model.rope.theta` is 500000: has no effect")
    assert all(problem.startswith("phases[2]: `optimizer.min_lr` is 1") for problem in found[1:])


def test_what_all_phases_share_is_said_once(check: Callable[..., list[str]]) -> None:
    [problem] = check([ABF, {}], "parallel.tensor=2", world_size=3)
    assert problem.startswith("the world has 3 ranks")


def test_what_one_phase_uses_is_of_use(check: Callable[..., list[str]]) -> None:
    cpt = {"objectives": {"short_to_long": None, "short_restoration": None}}
    assert check([cpt, ABF], "teacher.hf=other") == []
    found = check([cpt, {**cpt, "data": {"mine": {"m": 1}}}], "teacher.hf=other")
    assert sorted(p.split(":")[0] for p in found) == [
        "`data.short` has no effect",
        "`data.window` has no effect",
        "`teacher.hf` is " + found[0].split(" is ")[1].split(":")[0],
        "phases[1]",
    ]
    assert "phases[1]: `data.mine` has no effect" in "\n".join(found)


def test_only_teachers_that_an_objective_compares_with_are_read(
    read: Callable[..., Recipe], config: dict[str, Architecture], architecture: Architecture, tmp_path: Path
) -> None:
    config["large"] = large = replace(architecture, num_layers=48)
    own = {"short_to_long": {"teacher": {"hf": "large"}}, "long_text": {"teacher": {"hf": "unread"}}}
    first, second, third = read_phases(
        read([{}, {"objectives": own}, {"objectives": {"short_to_long": None, "short_restoration": None}}])
    )
    model = tmp_path / "m"
    assert first.teachers == {model: architecture} and not third.teachers
    assert second.teachers == {tmp_path / "large": large, model: architecture}
    taught = {name: second.teacher_of(name) for name in second.recipe.objectives}
    assert taught == {"long_text": None, "short_to_long": tmp_path / "large", "short_restoration": model}
    assert list(second.taught_by(tmp_path / "large")) == ["short_to_long"]
    assert second.sites["short_to_long"].teacher == large and second.sites["short_restoration"].teacher == architecture
    assert all(site.student == architecture for site in second.sites.values())
    [(ours, theirs)] = second.needs["short_to_long"].pairs.items()
    assert (ours.layer, theirs.layer) == (32, 48)


def test_the_summary_says_what_is_shared_once(read: Callable[..., Recipe], config: dict[str, Architecture]) -> None:
    text = phases_summary(read_phases(read([ABF, PI], *ONLY_LONG_TEXT)), 1, gpu=True)
    starts = [line.split("  ")[0] for line in text.splitlines()]
    for once in ("world", "parameters", "not computed", "phase 1", "phase 2"):
        assert starts.count(once) == 1, (once, text)
    assert "steps 1 to 100, lr 0.0001 constant" in text and "steps 101 to 612, lr 2e-05 constant" in text
    assert "theta 1e+06" in text and "8,192 -> 65,536 tokens, rope pi" in text
    assert text.splitlines()[-1].endswith(f"{612 * 8 * 65536:,} in 612 steps")
    [whole] = read_phases(read(None, *ONLY_LONG_TEXT))
    assert "phase" not in phases_summary([whole], 1, gpu=True)


@pytest.mark.parametrize(
    ("of_recipe", "of_phase", "whole"),
    [
        ({}, {"context_parallel": 1}, True),
        ({"context_parallel": 1}, {}, True),
        ({"context_parallel": 1}, {"context_parallel": None}, False),
        ({"context_parallel": 1}, {"context_parallel": 2}, False),
        ({"context_parallel": 1}, {"whole_sequences": False}, False),
        ({"context_parallel": 2}, {"whole_sequences": True}, True),
        ({"whole_sequences": True}, {"context_parallel": None}, False),
        ({"whole_sequences": False}, {"context_parallel": 1}, True),
    ],
)
def test_a_phase_may_use_the_old_name_of_whole_sequences(
    write: Write, values: dict[str, Any], of_recipe: dict[str, Any], of_phase: dict[str, Any], whole: bool
) -> None:
    values["objectives"]["long_text"] |= of_recipe
    values["phases"] = [{}, {"objectives": {"long_text": of_phase}}]
    recipe = load_recipe(write(values))
    for each in (recipe, load_recipe(write(dump_recipe(recipe), "dumped.yaml"))):
        first, second = phases_of(each)
        assert first.objectives["long_text"].whole_sequences is recipe.objectives["long_text"].whole_sequences
        assert second.objectives["long_text"].whole_sequences is whole


def test_bad_values_under_the_old_name_in_a_phase(problems: Callable[..., list[str]]) -> None:
    both = {"context_parallel": 1, "whole_sequences": True}
    [problem] = problems([{"objectives": {"long_text": both}}])
    assert problem.startswith("`phases[0].objectives.long_text` has context_parallel and whole_sequences")
    for wrong in (0, True, "1"):
        found = problems([{}, {"objectives": {"long_text": {"context_parallel": wrong}}}])
        assert found and all("`phases[1].objectives.long_text" in each for each in found), found
        assert "context_parallel" in found[0]


def test_steps_is_short_for_training_steps(read: Callable[..., Recipe], problems: Callable[..., list[str]]) -> None:
    recipe = read([{"steps": 3}, {"steps": 4, "training": {"recompute": "none"}}], "phases.1.steps=5")
    assert [phase.training.steps for phase in phases_of(recipe)] == [3, 5]
    assert phases_of(recipe)[1].training.recompute == "none"
    (problem,) = problems([{"steps": 3, "training": {"steps": 4}}])
    assert problem.startswith("`phases[0].steps` is short for `phases[0].training.steps`: give one of them")


def test_phases_may_differ_in_fp8(read: Callable[..., Recipe]) -> None:
    recipe = read([ABF, ABF | {"precision": {"fp8": "hybrid", "fp8_recipe": "delayed"}}])
    assert [phase.precision.scaling for phase in phases_of(recipe)] == [None, "delayed"]
