"""Every layout equals one process; the comparison sees the faults that layouts are known for."""

from collections.abc import Mapping

import pytest

from tests.layouts.ranks import Outcome
from tests.layouts.table import FAULTS, LAYOUTS, Layout, differences, run_table

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    return run_table(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_gradient_norm_and_weights_are_those_of_one_process(
    layout: Layout, outcomes: Mapping[str, Outcome]
) -> None:
    assert max(differences(layout, outcomes).values()) < TOLERANCE


@pytest.mark.parametrize("layout", FAULTS, ids=lambda layout: str(layout.sabotage))
def test_faults_are_seen(layout: Layout, outcomes: Mapping[str, Outcome]) -> None:
    assert max(differences(layout, outcomes).values()) > 100 * TOLERANCE
