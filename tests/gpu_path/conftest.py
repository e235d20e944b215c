"""These tests need processes of their own, where Transformer Engine is imported before Megatron is.

`tests/test_gpu_path.py` starts them. By hand:

    LONGRED_TE=stub PYTHONPATH=.:.venv/transformer-engine .venv/bin/python -m pytest -n0 tests/gpu_path/test_casts.py
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

if "LONGRED_TE" not in os.environ:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    """A world of one process."""
    import torch

    from longred_megatron.layout import Parallel
    from longred_megatron.parallel.groups import destroy, initialize

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)  # NCCL wants a GPU
    yield initialize(Parallel(), seed=1)
    destroy()
