"""A layer of Transformer Engine's, planned, against bytes that Megatron-LM publishes of its own runs on H100.

Facts: layouts and `mem-allocated-bytes`, `mem-max-allocated-bytes` of tests/functional_tests/test_cases/gpt in
NVIDIA/Megatron-LM at commit d98e8a64, logged by the last rank. The models are others than ours: GPT with a MLP without
a gate, and cross-entropy on all logits at once; those of 7B with biases, LayerNorm, dropout and learned positions.
"""

from dataclasses import dataclass

import pytest

from longred_megatron.planning.operations import Tokens, Widths, cost, fused_layer, fused_norm
from longred_megatron.planning.schedule import stage_passes

KV_HEADS, HEAD_DIM, LAYERS, BYTES = 8, 128, 32, 2


@dataclass(frozen=True)
class Golden:
    hidden: int
    rows: int  # of the vocabulary, of all tensor ranks, filled up
    positions: int  # learned ones
    tokens: int  # of a micro-batch
    tensor: int
    pipeline: int
    virtual: int
    microbatches: int
    data: int
    sequence: bool
    dropout: bool
    resident: float
    peak: float


CASES = {
    "gpt3_7b_tp4_pp1_memory_speed": Golden(
        4096, 131584, 8192, 2 * 8192, 4, 1, 1, 2, 2, False, True, resident=20.6635e9, peak=57.1438e9
    ),
    "gpt3_7b_tp1_pp4_memory_speed": Golden(
        4096, 131200, 8192, 8192, 1, 4, 8, 4, 2, False, True, resident=24.8090e9, peak=60.7209e9
    ),
    # Its data-parallel ranks are not said: 16 follow from the resident bytes.
    "gpt3_15b_8t_release": Golden(
        6144, 256000, 0, 4 * 4096, 8, 1, 1, 6, 16, True, False, resident=13.2690e9, peak=28.1602e9
    ),
}


def resident(case: Golden) -> float:
    """Of the last stage: bf16 weights, fp32 gradients, and the optimizer's 12 bytes over the data-parallel ranks."""
    matrices = 2 * case.hidden**2 + 2 * case.hidden * KV_HEADS * HEAD_DIM + 8 * case.hidden**2
    tables = 1 if case.pipeline > 1 else 2
    elements = (LAYERS / case.pipeline * matrices + tables * case.rows * case.hidden) / case.tensor
    elements += case.positions * case.hidden if case.pipeline == 1 else 0
    return elements * (2 + 4 + 12 / case.data)


def most_in_flight(case: Golden) -> int:
    """Passes of the last stage's chunks that wait for their backward pass."""
    now = most = 0
    for each in stage_passes(case.pipeline - 1, case.pipeline, case.virtual, case.microbatches):
        now += -1 if each.backward else 1
        most = max(most, now)
    return most


def peak(case: Golden) -> float:
    """In the forward pass of a loss: the logits in bf16 and fp32."""
    t, n, ffn = case.tokens, case.tensor, 4 * case.hidden
    own = t / n if case.sequence else t
    kv = KV_HEADS * HEAD_DIM / n
    widths = Widths(case.hidden, case.hidden / n, kv, ffn / n, case.hidden / HEAD_DIM / n, HEAD_DIM, False)
    layer = cost(fused_layer(widths, Tokens(t, own, t), BYTES)).kept
    layer -= BYTES * t * ffn / n  # without a gate, the first product's output is half as wide
    layer += 2 * t * case.hidden if case.dropout else 0  # two masks of a byte a number
    activations = most_in_flight(case) * LAYERS / case.pipeline / case.virtual * layer
    return resident(case) + activations + fused_norm(case.hidden, own, BYTES).kept + t * case.rows / n * (2 + 4)


@pytest.mark.parametrize("name", CASES)
def test_memory_of_megatron_s_runs(name: str) -> None:
    case = CASES[name]
    print(f"{name}: resident {resident(case) / case.resident - 1:+.1%}, peak {peak(case) / case.peak - 1:+.1%}")
    assert resident(case) == pytest.approx(case.resident, rel=0.06)
    assert peak(case) == pytest.approx(case.peak, rel=0.03)
