"""Loading and exporting hold one parameter or one shard at a time, beside the parameters themselves."""

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longred_megatron.checkpoint import huggingface
from longred_megatron.checkpoint.huggingface import export, load_weights
from longred_megatron.config import read_architecture
from longred_megatron.config.schema import Parallel, Precision
from longred_megatron.model.stage import build_stages

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process table and sets glibc's allocator")
def test_no_second_copy_of_the_model_in_memory(tmp_path, groups, monkeypatch):
    # Tensors of a real size are given back to the system when they are freed. Here small ones are as well.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=16, vocab_size=2000, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source", max_shard_size="50MB")
    del model
    architecture = read_architecture(tmp_path / "source")
    stages = build_stages(architecture, Parallel(), Precision(params="fp32"), groups)
    model_bytes = sum(parameter.nbytes for parameter in stages[0].parameters())
    assert model_bytes > 150 * MIB
    for parameter in stages[0].parameters():
        parameter.data.fill_(0)  # its pages exist before anything is measured
    with peak_above_start() as loading:
        load_weights(stages, tmp_path / "source", architecture, groups)
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", SHARD_BYTES)
    with peak_above_start() as exporting:
        export(
            stages,
            tmp_path / "source",
            tmp_path / "output",
            architecture,
            groups,
            rope=architecture.rope,
            max_position_embeddings=architecture.max_position_embeddings,
        )
    largest = max(parameter.nbytes for parameter in stages[0].parameters())
    print(
        f"model {model_bytes / MIB:.0f} MiB; peaks above it: {loading[0] / MIB:.0f} loading, {exporting[0] / MIB:.0f}"
    )
    assert loading[0] < 4 * largest
    assert exporting[0] < SHARD_BYTES + 4 * largest
