"""Every family and every recipe is built of Transformer Engine's modules, and computes what transformers does."""

from tests.gpu_path import install

# isort: split

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_engine.pytorch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformer_engine.pytorch import DotProductAttention, LayerNormLinear, Linear, RMSNorm

from longred_megatron.checkpoint.huggingface import load_weights
from longred_megatron.checkpoint.verification import verify
from longred_megatron.families import read_architecture
from longred_megatron.layout import Parallel
from longred_megatron.model import userbuffers
from longred_megatron.model.chunk import ModelChunk, build_chunks
from longred_megatron.precision import Precision
from longred_megatron.recipe import dump_recipe, load_recipe, read_phases
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.run import build
from tests.checkpoint.small_models import MODELS, write_model
from tests.training.test_rehearsal import RECIPES, shrunk


@install.needs_plain_kernels
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    source = write_model(name, tmp_path / "source")
    architecture = read_architecture(source)
    chunks = build_chunks(architecture, Parallel(), Precision(params="fp32"), groups)
    load_weights(chunks, source, architecture, groups)
    install.calls.clear()
    found = verify(chunks, source, architecture, groups)
    assert found.different == [] and found.max_logit_difference < 1e-4 < 0.1 < found.max_logit
    layers = architecture.num_layers
    assert install.calls["fused_attn_fwd"] == layers and install.calls["generic_gemm"] == 4 * layers
    # Both norms of a layer and the last one; those of heads, in one call for all.
    assert install.calls["rmsnorm_fwd"] == (4 if name.startswith("qwen3") else 2) * layers + 1
    assert install.calls["fused_rope_forward"] == 2 * layers


def test_a_layer_is_made_of_transformer_engine(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    architecture = read_architecture(write_model("qwen3", tmp_path / "source"))
    [chunk] = build_chunks(architecture, Parallel(), Precision(), groups)
    kinds = {kind for module in chunk.decoder.modules() for kind in type(module).__mro__}
    assert {DotProductAttention, LayerNormLinear, Linear, RMSNorm} <= kinds


ON_ONE_RANK = [f"parallel.{key}=1" for key in ("tensor", "pipeline", "context")]
ON_ONE_RANK += ["parallel.virtual_pipeline=null", "parallel.sequence=false"]
BUILT = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.startswith("tiny_")]  # the demo's


@pytest.mark.parametrize("name", sorted({*BUILT} - {"llama3_8b_32k"}))  # a base of others
def test_a_recipe_is_built(name: str, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    rehearsal = shrunk(name, tmp_path, *ON_ONE_RANK)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(rehearsal.recipe))
    for phase in read_phases(load_recipe(path)):
        run = build(phase, MicroBatchSource(phase), groups)
        models = [run.chunks, *run.train_step.teachers.models.values()]
        assert all(layer.self_attention.core_attention.attention_type == "cross" for m in models for layer in layers(m))
        assert {p.dtype for m in models for chunk in m for p in chunk.parameters()} == {torch.bfloat16}


def layers(chunks: Sequence[ModelChunk]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk.decoder.layers


def test_userbuffers_are_asked_for_and_known_to_every_layer(
    tmp_path: Path, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    signature = inspect.signature(transformer_engine.pytorch.initialize_ub)

    def initialize_ub(*arguments: Any, **settings: Any) -> None:
        asked.append(signature.bind(*arguments, **settings).arguments)

    monkeypatch.setattr(transformer_engine.pytorch, "initialize_ub", initialize_ub)
    parallel = Parallel(tensor=2, sequence=True, tp_comm_overlap=True)
    userbuffers.allocate(parallel.of_teacher(4), "bf16", 64, 32)
    assert asked == []
    userbuffers.allocate(parallel, "bf16", 64, 32)
    [values] = asked
    assert values["shape"] == [64, 32] and values["tp_size"] == 2 and values["dtype"] == torch.bfloat16

    architecture = read_architecture(write_model("llama_3", tmp_path))
    for each, names in ((Parallel(tp_comm_overlap=True), {"qkv", "proj", "fc1", "fc2"}), (Parallel(), {None})):
        [chunk] = build_chunks(architecture, each, Precision(), groups)
        layers = [m for m in chunk.modules() if isinstance(m, (Linear, LayerNormLinear))]
        assert len(layers) == 4 * architecture.num_layers and {layer.ub_name for layer in layers} == names
