"""What a layer keeps for its backward pass, as Transformer Engine's own Python saves it, and as the planner says."""

from tests.gpu_path import install

# isort: split

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import FUSED
from tests.layouts.table import SIZES
from tests.training.workspace import build_run, make_workspace

pytestmark = install.needs_plain_kernels
WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 384, "head_dim": 32}
HEADS_OF_128 = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"long_text": {"microbatches": 4, "sequence_length": 256, "data": "texts"}}
PARTS = ("_data", "_transpose", "_scale_inv", "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv",
         "_columnwise_scale_inv")  # fmt: skip


@pytest.mark.parametrize(
    "fp8",
    [
        {},
        {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        {"fp8": "hybrid", "fp8_recipe": "blockwise"},
        {"fp8": "hybrid", "fp8_recipe": "delayed"},
        {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_attention": True},
    ],
    ids=["bf16", "tensorwise", "blockwise", "delayed", "attention"],
)
def test_a_layer_keeps_what_the_planner_says(
    fp8: dict[str, Any], tmp_path: Path, groups: ProcessGroupCollection
) -> None:
    kept = []
    for layers in (2, 4):
        sizes = WIDE | {"num_hidden_layers": layers} | (HEADS_OF_128 if "fp8_attention" in fp8 else {})
        folder = tmp_path / str(layers)
        run = build_run(
            make_workspace(folder, "llama_3", sizes, objectives=TEXT, precision={"params": "bf16"} | fp8), groups
        )
        run.train_step(run.data.step(1, 0, 1))  # from now on the weights' FP8 numbers are there
        kept.append(saved_bytes(run))
    stage = StageMemory(run.phase, 1, 0, FUSED)
    tokens = stage.tokens(run.phase.recipe.objectives["long_text"], run.phase.sites["long_text"])
    planned = sum(each.kept for each in stage.layer_operations(run.phase.source, tokens, run.phase.recipe.precision))
    assert (kept[1] - kept[0]) / 2 == pytest.approx(planned, abs=64)  # scales of whole tensors, and an empty seed


def saved_bytes(run: Any) -> int:
    """Of a forward pass, without weights and their FP8 numbers."""
    [chunk], microbatch, found = run.chunks, next(iter(run.data.step(1, 0, 1))), {}
    weights = [*chunk.parameters()]
    weights += [copy for module in chunk.modules() for copy in getattr(module, "_fp8_workspaces", {}).values()]
    own = {part.untyped_storage().data_ptr() for weight in weights for part in parts_of(weight)}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)  # or its address would be used again
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(microbatch.tokens, microbatch.student_positions, set(), False, None, None)
    return sum(found.values())


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantized one is made of."""
    parts = [part for name in PARTS if isinstance(part := getattr(tensor, name, None), Tensor)]
    yield from parts or [tensor]
