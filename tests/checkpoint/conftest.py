from collections.abc import Iterator

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    """The groups of a world of one process."""
    yield initialize(Parallel(), seed=1)
    destroy()
