"""What the groups are told when they are made."""

import resource
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
def few_files() -> Iterator[int]:
    """A process that may open 256, and as many as its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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


def test_there_is_room_for_the_sockets_of_many_ranks(few_files: int) -> None:
    initialize(Parallel(), seed=1)
    destroy()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (
        1 << 16 if few_files == resource.RLIM_INFINITY else min(few_files, 1 << 16)
    )
