"""What the groups are told when they are made."""

from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.layout import Parallel
from longred_megatron.parallel.groups import destroy, initialize

PATIENCE = timedelta(minutes=45)


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    yield initialize(Parallel(), seed=1, timeout=PATIENCE)
    destroy()


def test_every_group_waits_as_long_as_the_world(groups: ProcessGroupCollection) -> None:
    """A group with torch's own limit would end a job before the watchdog has named the rank that hangs."""
    held = [getattr(groups, field.name, None) for field in fields(groups)]
    made = {id(group): group for group in held if isinstance(group, torch.distributed.ProcessGroup)}
    assert len(made) > 5
    for group in (torch.distributed.group.WORLD, *made.values()):
        assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE, group.group_desc
