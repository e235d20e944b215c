"""The cases of `tests/layouts` over Transformer Engine, beside the same cases on the CPU path."""

from tests.gpu_path import install  # noqa: F401

# isort: split

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longred_megatron.parallel.local_ranks import run_ranks
from tests.layouts import ranks
from tests.layouts.ranks import Case, Outcome


def run_all(cases: Sequence[Case], folder: Path) -> Mapping[str, Outcome]:
    """Outcomes of the cases over Transformer Engine, by name."""
    for world in sorted({case.world for case in cases}):
        run_ranks(_rank, world, [case for case in cases if case.world == world], folder)
    return {case.name: ranks._outcome(folder / case.name) for case in cases}


def _rank(join: Callable[[str], None], cases: Sequence[Case], folder: Path) -> None:
    ranks._rank(join, cases, folder)
