"""The divergence of self-relations against the same computation with whole relations: peak memory."""

import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from longred_megatron.kernels import relation_divergence as module
from longred_megatron.kernels.relation_divergence import relation_divergence

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process table")

MIB = 2**20
HEADS, HEAD_DIM, TEACHER_HEAD_DIM = 2, 32, 48


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, tokens, HEADS, head_dim) for head_dim in (HEAD_DIM, TEACHER_HEAD_DIM))
    student, teacher = (torch.randn(shape, generator=generator) for shape in shapes)
    return [student.requires_grad_(), teacher]


def blocked(student: torch.Tensor, teacher: torch.Tensor) -> None:
    relation_divergence(student, teacher).backward()


def in_small_blocks(student: torch.Tensor, teacher: torch.Tensor) -> None:
    module.BLOCK_BYTES = 4 * MIB
    blocked(student, teacher)


def eager(student: torch.Tensor, teacher: torch.Tensor) -> None:
    future = torch.ones(student.shape[1], student.shape[1], dtype=torch.bool).triu_(1)

    def log_probabilities(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.transpose(1, 2)
        return (rows @ rows.mT / rows.shape[-1] ** 0.5).masked_fill_(future, -1e30).log_softmax(-1)

    kl_div(log_probabilities(student), log_probabilities(teacher), log_target=True, reduction="sum").backward()


def resident_bytes(field: str) -> int:
    """VmRSS: this process's memory now; VmHWM: the most it had."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak_bytes(compute, tokens: int) -> int:
    """Above the inputs. The tensors that matter are so large that malloc gives them back when they are freed."""
    torch.set_num_threads(1)
    tensors = inputs(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = resident_bytes("VmRSS")
    compute(*tensors)
    return resident_bytes("VmHWM") - start


def measured(*cases) -> list[int]:
    """Peaks of (compute, tokens), each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as process:
        return [process.submit(peak_bytes, *case).result() for case in cases]


def test_at_most_a_tenth_of_the_memory_of_whole_relations():
    """At 8192 tokens and 2 heads in fp32, forward and backward."""
    ours, whole = measured((blocked, 8192), (eager, 8192))
    print(f"peaks: {ours / MIB:.0f} MiB; whole relations {whole / MIB:.0f} MiB")
    assert ours <= whole / 10


def test_memory_grows_linearly_in_the_length():
    """In blocks of one size, 4 times the tokens: linear memory is 4 times as much at most, quadratic 16 times."""
    short, long = measured((in_small_blocks, 2048), (in_small_blocks, 8192))
    print(f"peaks: {short / MIB:.0f} MiB, at 4 times the length {long / MIB:.0f} MiB")
    assert long <= 4 * short
