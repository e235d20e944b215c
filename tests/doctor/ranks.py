"""What the doctor calls on a rank, on ranks of this machine, with a fault or without."""

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from longred_megatron.parallel.groups import destroy
from longred_megatron.parallel.local_ranks import run_ranks

Fault = Callable[[], AbstractContextManager[None]]


def say_nothing(place: str) -> None:
    pass


def on_ranks(
    num_ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any, fault: Fault | None = None
) -> list[Any]:
    """The results of `function(report, *arguments)` by rank."""
    run_ranks(_rank, num_ranks, function, folder, arguments, fault)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(num_ranks)]


def _rank(
    join: Callable[[str], None],
    function: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
    fault: Fault | None,
) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    join("world")
    rank = torch.distributed.get_rank()
    with fault() if fault else nullcontext():
        result = function(say_nothing, *arguments)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    destroy()
