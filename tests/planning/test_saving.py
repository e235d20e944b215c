"""What an export holds on the device beside the model, on two tensor ranks of this CPU."""

import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from longred_megatron.checkpoint.huggingface import full_tensors
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import FUSED
from longred_megatron.recipe import load_recipe, read_phases
from tests.planning.measure import SIZES
from tests.training.workspace import build_run, make_workspace

TENSOR = ("parallel.tensor=2",)
NORMS = 2 * SIZES["hidden_size"] * 4  # bytes, of both ranks; on a CPU the file's tensor is the gathered one


def test_an_export_gathers_one_parameter_at_a_time(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, "llama_3", SIZES)
    run_ranks(_rank, 2, recipe, tmp_path / "bytes.json")
    most, kept = json.loads((tmp_path / "bytes.json").read_text())
    [phase] = read_phases(load_recipe(recipe, TENSOR))
    export = StageMemory(phase, 2, 0, FUSED).memory().peaks[-1]
    assert export.moment == "the export" and export.parts["gathered parameter"] == SIZES["vocab_size"] * 64 * 4
    assert most <= export.parts["gathered parameter"] + NORMS
    assert kept <= NORMS


def _rank(join: Callable[[str], None], recipe: Path, output: Path) -> None:
    join("export")
    groups = initialize(load_recipe(recipe, TENSOR).parallel, seed=1)
    run = build_run(recipe, groups, *TENSOR)
    alive: dict[int, int] = {}
    most = kept = 0  # bytes: at any time, and of earlier parameters where the next one's are made
    is_first = True
    empty_like, gather = torch.empty_like, torch.distributed.gather

    def counted(like: torch.Tensor) -> torch.Tensor:
        nonlocal most, kept, is_first
        if is_first:
            _let_go(alive)
            kept = max(kept, sum(alive.values()))
        is_first = False
        made = empty_like(like)
        storage = made.untyped_storage()
        alive[id(storage)] = storage.nbytes()
        weakref.finalize(storage, alive.pop, id(storage))
        most = max(most, sum(alive.values()))
        return made

    def gathered(*arguments: Any, **more: Any) -> None:
        nonlocal is_first
        gather(*arguments, **more)
        is_first = True

    with patch.object(torch, "empty_like", counted), patch.object(torch.distributed, "gather", gathered):
        for _ in full_tensors(run.chunks, run.student, groups):
            pass
    if groups.tp.rank() == 0:
        output.write_text(json.dumps([most, kept]))
    destroy()


def _let_go(alive: dict[int, int]) -> None:
    """gloo's thread drops the last gather's tensors a little after it has ended: waits for it, a second at most."""
    until = time.monotonic() + 1
    while sum(alive.values()) > NORMS and time.monotonic() < until:
        time.sleep(0.001)
