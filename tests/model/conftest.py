"""A world of one process."""

from tests.training.conftest import groups  # noqa: F401 (a fixture)
