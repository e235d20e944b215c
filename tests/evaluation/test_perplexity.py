import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM

from longred_megatron.evaluation.intervals import Interval, mean_interval
from longred_megatron.evaluation.models import CausalModel, head_is_plain
from longred_megatron.evaluation.perplexity import (
    NUM_BUCKETS,
    LossByPosition,
    bucket_edges,
    loss_by_position,
    measure_losses,
    token_losses,
)
from longred_megatron.evaluation.texts import Windows
from tests.evaluation.conftest import loaded

TOKENS = torch.randint(0, 258, (5, 96), generator=torch.Generator().manual_seed(0))
WINDOWS = Windows(TOKENS, documents=(0, 0, 1, 2, 2))


def measured(model: CausalModel, tokens_per_batch: int = 96) -> LossByPosition:
    return loss_by_position(measure_losses(model, WINDOWS, tokens_per_batch, ""), WINDOWS, seed=0)


def test_mean_loss_equals_transformers(base: CausalModel) -> None:
    result = measured(base, tokens_per_batch=200)
    with torch.no_grad():
        expected = base.network(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert (result.window, result.num_windows) == (96, 5)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 95, 96])
def test_chunks_do_not_change_losses(base: CausalModel, chunk_tokens: int) -> None:
    whole = token_losses(base, TOKENS, chunk_tokens=10**6)
    assert whole.shape == (5, 95)
    torch.testing.assert_close(token_losses(base, TOKENS, chunk_tokens), whole, rtol=1e-6, atol=1e-6)


def test_buckets_are_means_over_positions_and_cover_the_window(base: CausalModel) -> None:
    result = measured(base)
    losses = token_losses(base, TOKENS)
    assert len(result.buckets) == NUM_BUCKETS
    assert (result.buckets[0].start, result.buckets[-1].stop) == (0, 96)
    for bucket in result.buckets:
        part = losses[:, max(bucket.start - 1, 0) : bucket.stop - 1]  # column p - 1 is the token at position p
        assert bucket.loss == pytest.approx(part.mean().item(), rel=1e-5)


def test_standard_error_is_over_windows(base: CausalModel) -> None:
    of_windows = token_losses(base, TOKENS).mean(dim=1)
    result = measured(base)
    assert result.loss_standard_error == pytest.approx((of_windows.std() / math.sqrt(5)).item(), rel=1e-4)
    single = Windows(TOKENS[:1], (0,))
    alone = loss_by_position(measure_losses(base, single, 96, ""), single, seed=0)
    assert alone.loss_standard_error is alone.loss_interval is alone.perplexity_interval is None


def test_intervals_are_over_documents_and_paired(base: CausalModel, folders: dict[str, Path]) -> None:
    """Two documents of two windows each, one of one; the difference's interval is that of the differences."""
    other = loaded(folders["longer"])
    ours, theirs = (measure_losses(model, WINDOWS, 96, "") for model in (other, base))
    result = loss_by_position(ours, WINDOWS, 0, theirs)
    apart = (token_losses(other, TOKENS) - token_losses(base, TOKENS)).double().numpy()
    expected = mean_interval(apart.mean(axis=1)[:, None], WINDOWS.documents)
    assert result.against_reference and result.against_reference.interval and expected
    assert result.against_reference.loss == pytest.approx(apart.mean(), rel=1e-5)
    assert result.against_reference.interval.low == pytest.approx(expected[0].low, rel=1e-5)
    for bucket in result.against_reference.buckets:
        assert bucket.loss == pytest.approx(apart[:, max(bucket.start - 1, 0) : bucket.stop - 1].mean(), abs=1e-5)
    assert result.num_documents == 3
    assert result.perplexity_interval and result.loss_interval
    assert result.perplexity_interval.high == pytest.approx(math.exp(result.loss_interval.high))
    same = loss_by_position(ours, WINDOWS, 0, ours).against_reference
    assert same and same.interval == Interval(0.0, 0.0)


@pytest.mark.parametrize("window", [2, 3, 31, 32, 33, 64, 96, 1000])
def test_buckets_cover_every_window(window: int) -> None:
    edges = bucket_edges(window)
    assert (edges[0], edges[-1]) == (0, window) and len(edges) - 1 <= NUM_BUCKETS
    assert edges[1] >= 2 and all(start < stop for start, stop in pairwise(edges))


def test_model_that_scales_its_logits(base: CausalModel) -> None:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, logits_scaling=4.0,
    )  # fmt: skip
    network = GraniteForCausalLM(config).eval()
    plain = head_is_plain(network, torch.device("cpu"))
    assert not plain
    assert base.head_is_plain
    model = CausalModel("granite", base.facts, network, base.encoder, base.device, plain)
    with torch.no_grad():
        logits = network(input_ids=TOKENS).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none").view(5, 95)
    torch.testing.assert_close(token_losses(model, TOKENS), expected)
