"""Weights through every kind of split at once: tensor, pipeline and virtual pipeline ranks."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longred_megatron.checkpoint import huggingface
from longred_megatron.checkpoint.huggingface import export, load_weights
from longred_megatron.checkpoint.verification import same_bits
from longred_megatron.errors import UserError
from longred_megatron.families import read_architecture
from longred_megatron.layout import Parallel
from longred_megatron.model.chunk import build_chunks
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.precision import Precision
from tests.checkpoint.small_models import ONE_OF_EACH_FAMILY, write_model

NUM_RANKS = 4
# The vocabulary is odd: the embedding's last row is padding on the second tensor rank.
MODELS = dict.fromkeys(ONE_OF_EACH_FAMILY) | {"qwen3_tied": 2}  # virtual pipeline


def convert(join: Callable[[str], None], folder: Path) -> None:
    """What each rank runs: there and back for each model, then once more on a full disk of one rank."""
    for name, virtual_pipeline in MODELS.items():
        join(name)
        parallel = Parallel(tensor=2, pipeline=2, virtual_pipeline=virtual_pipeline)
        groups = initialize(parallel, seed=1)
        source = folder / name
        architecture = read_architecture(source)
        chunks = build_chunks(architecture, parallel, Precision(params="fp32"), groups)
        load_weights(chunks, source, architecture, groups)
        unchanged = {
            "rope": architecture.rope,
            "max_position_embeddings": architecture.max_position_embeddings,
        }
        export(chunks, source, folder / f"{name}-back", architecture, groups, **unchanged)
        if torch.distributed.get_rank() == 2:  # tensor rank 0 of the last stage
            huggingface.save_tensors = full_disk
        with pytest.raises(UserError, match="disk is full"):
            export(chunks, source, folder / f"{name}-full", architecture, groups, **unchanged)
        huggingface.save_tensors = save_tensors
        destroy()


save_tensors = huggingface.save_tensors


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_tensor_and_pipeline_parallel_there_and_back(tmp_path):
    for name in MODELS:
        write_model(name, tmp_path / name)
    run_ranks(convert, NUM_RANKS, tmp_path)
    for name in MODELS:
        expected = load_file(tmp_path / name / "model.safetensors")
        files = sorted((tmp_path / f"{name}-back").glob("*.safetensors"))
        assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        back = [load_file(file) for file in files]
        assert back[0].keys().isdisjoint(back[1].keys()) and back[0].keys() | back[1].keys() == expected.keys()
        for tensor_name, tensor in (back[0] | back[1]).items():
            assert same_bits(tensor, expected[tensor_name]), tensor_name
        assert not list(tmp_path.glob(f"*{name}-full*"))
