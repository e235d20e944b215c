"""A world of one process."""

from collections.abc import Iterator

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize
from tests.data.conftest import write_indexed  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    yield initialize(Parallel(), seed=1)
    destroy()
