"""Logit distillation against the same computation with whole logits: peak memory and time."""

import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from longred_megatron.kernels.divergence import linear_distillation

MIB = 2**20
WIDTH, TEACHER_WIDTH = 32, 48


def inputs(tokens: int, vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, WIDTH), (vocab, WIDTH), (tokens, TEACHER_WIDTH), (vocab, TEACHER_WIDTH))
    hidden, weight, *teacher = (torch.randn(shape, generator=generator) for shape in shapes)
    return [hidden.requires_grad_(), weight.requires_grad_(), *teacher]


def chunked(hidden, weight, teacher_hidden, teacher_weight) -> None:
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    linear_distillation(hidden, weight, teacher_hidden, teacher_weight, labels, vocab_size=len(weight)).backward()


def eager(hidden, weight, teacher_hidden, teacher_weight) -> None:
    student = (hidden @ weight.t()).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    kl_div(student, teacher, log_target=True, reduction="sum").backward()


def resident_bytes(field: str) -> int:
    """VmRSS: this process's memory now; VmHWM: the most it had."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak_bytes(compute, tokens: int, vocab: int) -> int:
    """Above the inputs. The tensors that matter are so large that malloc gives them back when they are freed."""
    torch.set_num_threads(2)
    tensors = inputs(tokens, vocab)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = resident_bytes("VmRSS")
    compute(*tensors)
    return resident_bytes("VmHWM") - start


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process table")
def test_at_most_a_tenth_of_the_memory_of_whole_logits():
    """At 8192 tokens and 128,256 entries in fp32, forward and backward.

    Whole logits need more than many machines have, 4.2 GB a tensor. Their peak is that at 256 tokens extrapolated
    along the line through those at 128 and 256.
    """
    tokens, vocab = 8192, 128_256
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        measure = lambda *arguments: process.submit(peak_bytes, *arguments).result()  # noqa: E731
        at_128, at_256 = measure(eager, 128, vocab), measure(eager, 256, vocab)
        ours = measure(chunked, tokens, vocab)
    whole = at_256 + (at_256 - at_128) * (tokens - 256) // 128
    print(f"peaks: {ours / MIB:.0f} MiB; whole logits {at_128 / MIB:.0f}, {at_256 / MIB:.0f} -> {whole / MIB:.0f} MiB")
    assert ours <= whole / 10


def test_at_most_1_3_times_the_time_of_whole_logits():
    """In one thread, at a size where whole logits fit: the least of a few runs that take turns."""
    tensors = inputs(512, 32_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"chunked": [], "eager": []}
    for _ in range(5):
        for compute in (chunked, eager):
            start = time.perf_counter()
            compute(*tensors)
            seconds[compute.__name__].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    print(seconds)
    assert min(seconds["chunked"]) <= 1.3 * min(seconds["eager"])
