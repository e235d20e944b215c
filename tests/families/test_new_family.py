"""CONTRIBUTING's example of a new family, dropped into the package as a file: all of Gemma, against transformers."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from longred_megatron import families
from longred_megatron.analysis.network import Network
from longred_megatron.analysis.walk import walk as walk_layers
from longred_megatron.checkpoint.huggingface import export, load_weights
from longred_megatron.checkpoint.verification import same_bits, verify
from longred_megatron.errors import UserError
from longred_megatron.layout import Parallel
from longred_megatron.model.chunk import build_chunks
from longred_megatron.model.megatron_config import transformer_config
from longred_megatron.model.plain_layers import RMSNorm
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.precision import Precision
from tests.checkpoint.small_models import GROUPED, SIZES
from tests.walks import example as walk

MODULE = f"{families.__name__}.gemma"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's file in a second folder of the package `longred_megatron.families`."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "gemma.py").write_text(walk("A new model family"))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    families.discover()
    yield
    del families.FAMILIES["gemma"], sys.modules[MODULE], families.gemma  # type: ignore[attr-defined]
    importlib.invalidate_caches()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = GemmaConfig(**SIZES, **GROUPED, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # its norms start at zero
        parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    yield initialize(Parallel(), seed=1)
    destroy()


def test_one_file_is_enough(example: None, source: Path, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    architecture = families.read_architecture(source)
    chunks = build_chunks(architecture, Parallel(), Precision(params="fp32"), groups)
    load_weights(chunks, source, architecture, groups)
    window = {"rope": architecture.rope, "max_position_embeddings": architecture.max_position_embeddings}
    export(chunks, source, tmp_path / "output", architecture, groups, **window)
    got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "output", source))
    assert got.keys() == expected.keys() and all(same_bits(got[name], tensor) for name, tensor in expected.items())
    found = verify(chunks, tmp_path / "output", architecture, groups)
    assert found.different == [] and found.max_logit_difference < 1e-4 < 0.1 < found.max_logit


@torch.no_grad()
def test_analyses_walk_through_it(example: None, source: Path) -> None:
    tokens = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(source)(tokens, output_hidden_states=True).hidden_states
    assert plain is not None
    for each in walk_layers(Network(source, torch.float32, torch.device("cpu")), tokens):
        torch.testing.assert_close(each.hidden, plain[each.layer][0], rtol=1e-4, atol=1e-4)


def test_without_the_file_it_is_unknown(source: Path) -> None:
    with pytest.raises(UserError, match="model_type 'gemma' is not supported"):
        families.read_architecture(source)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norm_that_multiplies_by_one_and_the_weight(dtype: str, example: None, source: Path) -> None:
    architecture = families.read_architecture(source)
    config = transformer_config(architecture, Parallel(), Precision(params=dtype))
    own, theirs = RMSNorm(config, 32), GemmaRMSNorm(32, eps=1e-5).to(config.params_dtype)
    weight, x = torch.randn(2, 5, 32).to(config.params_dtype)
    own.weight.data, theirs.weight.data = weight[0], weight[0].clone()
    torch.testing.assert_close(own(x), theirs(x))
