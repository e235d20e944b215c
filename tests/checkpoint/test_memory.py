"""Loading, exporting and checkpoints hold one parameter or one shard at a time, beside the state itself."""

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoModelForCausalLM, LlamaConfig

from longred_megatron.checkpoint import distributed, huggingface
from longred_megatron.checkpoint.huggingface import export, load_weights
from longred_megatron.families import Architecture, read_architecture
from longred_megatron.layout import Parallel
from longred_megatron.model.chunk import ModelChunk, build_chunks
from longred_megatron.precision import Precision
from longred_megatron.recipe.schema import Optimizer
from longred_megatron.training.optimizer import build_optimizer, data_parallel

MIB = 2**20
M_MMAP_THRESHOLD = -3  # glibc's malloc.h
SHARD_BYTES = 16 * MIB


def anonymous_bytes() -> int:
    """This process's own memory. Pages of mapped files, which the kernel drops at will, are not in it."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@contextmanager
def peak_above_start() -> Iterator[list[int]]:
    """Yields a list that holds, afterwards, the most bytes this process had more than at the start."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads Linux's process table and sets glibc's allocator"
)


@pytest.fixture
def model(tmp_path: Path, groups: ProcessGroupCollection) -> tuple[Architecture, list[ModelChunk]]:
    """A model of 150 MiB, also as the folder `source`."""
    # Tensors of a real size are given back to the system when they are freed. Here small ones are as well.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=16, vocab_size=2000, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "source", max_shard_size="50MB"
    )
    architecture = read_architecture(tmp_path / "source")
    chunks = build_chunks(architecture, Parallel(), Precision(params="fp32"), groups)
    assert sum(parameter.nbytes for parameter in chunks[0].parameters()) > 150 * MIB
    for parameter in chunks[0].parameters():
        parameter.data.fill_(0)  # its pages exist before anything is measured
    return architecture, chunks


def largest_bytes(chunks: list[ModelChunk]) -> int:
    return max(parameter.nbytes for parameter in chunks[0].parameters())


def test_no_second_copy_of_the_model(tmp_path, groups, model, monkeypatch):
    architecture, chunks = model
    with peak_above_start() as loading:
        load_weights(chunks, tmp_path / "source", architecture, groups)
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", SHARD_BYTES)
    with peak_above_start() as exporting:
        export(
            chunks,
            tmp_path / "source",
            tmp_path / "output",
            architecture,
            groups,
            rope=architecture.rope,
            max_position_embeddings=architecture.max_position_embeddings,
        )
    print(f"peaks above the model: {loading[0] / MIB:.0f} MiB loading, {exporting[0] / MIB:.0f} exporting")
    assert loading[0] < 4 * largest_bytes(chunks)
    assert exporting[0] < SHARD_BYTES + 4 * largest_bytes(chunks)


def test_no_second_copy_of_the_training_state(tmp_path, groups, model):
    architecture, chunks = model
    optimizer = build_optimizer(
        Optimizer(lr=1.0e-3), Precision(params="fp32"), data_parallel(chunks, groups, overlap=False)
    )
    optimizer.step()  # the gradients are zero
    model_bytes = sum(parameter.nbytes for parameter in chunks[0].parameters())  # and Adam's moments twice as many
    description = {"architecture": asdict(architecture), "source_hf": "", "dtype": "fp32"}
    with peak_above_start() as saving:
        distributed.save(tmp_path / "checkpoint", chunks, description, optimizer)
    with peak_above_start() as loading:
        distributed.load(tmp_path / "checkpoint", chunks, optimizer)
    print(f"peaks above the state: {saving[0] / MIB:.0f} MiB saving, {loading[0] / MIB:.0f} loading")
    assert saving[0] < model_bytes / 2
    assert loading[0] < model_bytes / 2
