"""The cases of `tests/layouts` over Transformer Engine, beside the same cases on the CPU path."""

from tests.gpu_path import install  # noqa: F401

# isort: split

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.training import optimizer
from tests.layouts import ranks
from tests.layouts.ranks import Case, Outcome


def run_all(cases: Sequence[Case], folder: Path) -> Mapping[str, Outcome]:
    """Outcomes of the cases over Transformer Engine, by name."""
    for world in sorted({case.world for case in cases}):
        run_ranks(_rank, world, [case for case in cases if case.world == world], folder)
    return {case.name: ranks._outcome(folder / case.name) for case in cases}


def _rank(join: Callable[[str], None], cases: Sequence[Case], folder: Path) -> None:
    # Several buckets, as real models have: each is reduced, and gathered, for itself.
    config = partial(optimizer.DistributedDataParallelConfig, bucket_size=5_000)
    with patch.object(optimizer, "DistributedDataParallelConfig", config):
        ranks._rank(join, cases, folder)
