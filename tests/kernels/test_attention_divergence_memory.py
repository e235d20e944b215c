"""Attention drift never has whole attention matrices in memory."""

import sys

import pytest
import torch

from longred_megatron.kernels.attention_divergence import attention_divergence
from tests.kernels.test_relation_divergence_memory import HEADS, MIB, measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process table")


def streamed(rows: torch.Tensor, others: torch.Tensor) -> None:
    """[1, tokens, heads, head_dim] each."""
    query, other = (x[0].detach().transpose(0, 1) for x in (rows, others))
    attention_divergence(query, query.split(512, 1), other, other.split(512, 1))


def test_memory_is_far_below_that_of_one_attention_matrix() -> None:
    """Of 16,384 tokens: a matrix of one head would be 1 GiB in fp32."""
    short, long = measured((streamed, 4096), (streamed, 16384))
    print(f"peaks: {short / MIB:.0f} MiB, at 4 times the length {long / MIB:.0f} MiB; one matrix {HEADS * 1024} MiB")
    assert long <= 4 * short + 16 * MIB and long <= 128 * MIB
