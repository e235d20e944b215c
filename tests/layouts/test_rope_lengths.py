"""A RoPE that depends on the length of the micro-batch: context ranks, which hold parts of it, must agree on it."""

from collections.abc import Mapping

import pytest

from tests.layouts.ranks import Case, Outcome, run_all
from tests.training.workspace import make_workspace

TOLERANCE = 1e-5
METHODS = {
    "dynamic": "{method: dynamic, factor: 64}",
    "longrope": "{method: longrope, short_factor: [1.0, 1.0, 1.0, 1.0], long_factor: [4.0, 8.0, 8.0, 8.0]}",
}
CHANGES = {
    # Longer than the original window of 64 tokens; what one of two context ranks has of it is not.
    "objectives": {"long_text": {"microbatches": 2, "sequence_length": 80, "data": "texts"}},
    "step": {"tokens_per_microbatch": 320},
    "optimizer": {"lr": 0.5, "eps": 1.0},
}
LAYOUTS = {
    "one": (1, (), None),
    "context": (2, ("parallel.context=2",), None),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "training.recompute=full"), None),
    "fault": (2, ("parallel.context=2",), "length_of_own_rank"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    folder = tmp_path_factory.mktemp("rope")
    recipe = make_workspace(folder / "workspace", **CHANGES)
    cases = [
        Case(f"{method}-{layout}", world, recipe, (*overrides, f"model.rope={rope}"), sabotage)
        for method, rope in METHODS.items()
        for layout, (world, overrides, sabotage) in LAYOUTS.items()
    ]
    return run_all(cases, folder)


@pytest.mark.parametrize("layout", ["context", "pipeline"])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_rotate_as_one_process(method: str, layout: str, outcomes: Mapping[str, Outcome]) -> None:
    difference = outcomes[f"{method}-{layout}"].difference(outcomes[f"{method}-one"])
    assert max(difference.values()) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_looks_at_its_own_part_is_seen(method: str, outcomes: Mapping[str, Outcome]) -> None:
    difference = outcomes[f"{method}-fault"].difference(outcomes[f"{method}-one"])
    assert max(difference.values()) > 20 * TOLERANCE  # random weights look little at positions


def test_the_two_methods_differ(outcomes: Mapping[str, Outcome]) -> None:
    assert max(outcomes["dynamic-one"].difference(outcomes["longrope-one"]).values()) > 100 * TOLERANCE
