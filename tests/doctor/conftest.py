"""A recipe's small copy, as the doctor makes it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longred_megatron.doctor.examination import _write_small
from longred_megatron.recipe import load_recipe, read_phases
from tests.training.workspace import make_workspace


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the small copy of the workspace's recipe with some keys changed; returns its recipe."""

    def write(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("small")
        (folder / "source").mkdir()
        recipe = load_recipe(make_workspace(folder / "source"), overrides)
        [path] = _write_small(recipe, read_phases(recipe), folder).values()
        return path

    return write
