"""The plan against live tensors, messages and operations of real steps on this CPU. All layouts: `make plan-check`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.planning.measure import (
    CASES,
    Case,
    Compared,
    compare,
    compare_flops,
    compare_messages,
    measure,
    workspaces,
)

# One of each axis, recomputation, number format and kind of recipe.
CHOSEN = (
    "restoration world=1 training.recompute=full precision.params=bf16",
    "kinds world=1 training.recompute=none precision.params=fp32",
    "packed world=1 training.recompute=full precision.params=bf16",
    "restoration world=2 parallel.tensor=2 parallel.sequence=true training.recompute=none precision.params=fp32",
    "restoration world=2 parallel.pipeline=2 parallel.virtual_pipeline=2 training.recompute=none precision.params=fp32",
    "restoration world=2 parallel.context=2 training.recompute=full precision.params=fp32",
    "packed world=2 parallel.tensor=2 parallel.sequence=true training.recompute=full precision.params=fp32",
    "kinds world=2 parallel.tensor=2 parallel.sequence=true training.recompute=none precision.params=fp32",
    "tied world=2 parallel.tensor=2 training.recompute=none precision.params=fp32",
    "restoration world=4 parallel.tensor=2 parallel.pipeline=2 parallel.sequence=true "
    "training.recompute=selective precision.params=bf16",
)
RESIDENT = ("weights", "gradients", "optimizer", "teacher")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], Mapping[str, Path], Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("planning")
    cases, recipes = [case for case in CASES if case.name in CHOSEN], workspaces(folder)
    assert len(cases) == len(CHOSEN)
    return cases, recipes, measure(cases, recipes, folder / "out")


@pytest.fixture(scope="module")
def compared(measured: tuple[list[Case], Mapping[str, Path], Mapping[str, Any]]) -> list[Compared]:
    return list(compare(*measured))


def test_messages_are_exact(
    measured: tuple[list[Case], Mapping[str, Path], Mapping[str, Any]],
) -> None:
    found = list(compare_messages(*measured))
    assert {axis for _, axis, sent, _ in found if sent} == {"tensor", "pipeline", "data"}
    for name, axis, sent, planned in found:
        assert planned == sent, (name, axis)


def test_flops_are_within_a_fifth_of_a_percent(
    measured: tuple[list[Case], Mapping[str, Path], Mapping[str, Any]],
) -> None:
    found = list(compare_flops(*measured))
    assert len(found) == len(CHOSEN)
    for name, counted, planned in found:
        assert planned == pytest.approx(counted, rel=0.002), name


def test_the_total_is_within_three_percent(compared: list[Compared]) -> None:
    assert {each.case: each.error for each in compared if abs(each.error) > 0.03} == {}


def test_every_part_is_within_four_percent(compared: list[Compared]) -> None:
    for each in compared:
        errors = each.errors()
        assert all(abs(error) < 0.04 for error in errors.values()), (each.case, errors)
        assert all(abs(errors.get(part, 0.0)) < 0.005 for part in RESIDENT), (each.case, errors)


def test_one_recomputed_layer_and_cut_inputs_are_exact(compared: list[Compared]) -> None:
    [found] = [each for each in compared if "parallel.context=2 training.recompute=full" in each.case]
    assert all(abs(error) < 0.005 for error in found.errors().values()), found.errors()


def test_more_stages_than_one_were_looked_at(compared: list[Compared]) -> None:
    assert {each.stage for each in compared} == {0, 1}


def test_cases_are_enough() -> None:
    assert len(CASES) >= 24 and len({case.name for case in CASES}) == len(CASES)
    assert {Path(case.recipe).name for case in CASES} == {"restoration", "packed", "kinds", "tied"}
