import pytest
import torch
from torch import Tensor

from longred_megatron.kernels import attention_divergence as module
from longred_megatron.kernels.attention_divergence import attention_divergence

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 4, 2, 23, 8


def draw(seed: int, size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(3, heads, TOKENS, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    return size * query, size * key


def log_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scale * query.double() @ key.double().transpose(2, 3)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).log_softmax(-1)


@pytest.fixture(params=[(256, 1024), (5, 3)], ids=["one block", "many"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(module, "BLOCK_COLUMNS", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_the_divergence_of_plain_attention(scale: float | None) -> None:
    (q, k), (other_q, other_k) = draw(0), draw(1)
    log_p = log_probabilities(q, k, scale or HEAD_DIM**-0.5)
    log_q = log_probabilities(other_q, other_k, HEAD_DIM**-0.5)
    reference = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum(-1)
    found = attention_divergence(q, k, other_q, other_k, scale)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float64 and found.mean() > 0.1
    assert found[:, :, 0].abs().max() < 1e-6  # the first token sees itself alone


@pytest.mark.usefixtures("blocks")
def test_fewer_queries_than_keys_are_the_last() -> None:
    (q, k), (other_q, other_k) = draw(0), draw(1)
    found = attention_divergence(q[:, :, 7:], k, other_q[:, :, 7:], other_k)
    torch.testing.assert_close(found, attention_divergence(q, k, other_q, other_k)[:, :, 7:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("blocks")
def test_an_attention_is_not_away_from_itself() -> None:
    q, k = draw(2, size=20.0)
    assert not attention_divergence(q, k, q, k).any()


def test_small_differences_are_not_lost() -> None:
    q, k = draw(3)
    moved = q + 1e-3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    log_p, log_q = (log_probabilities(x, k, HEAD_DIM**-0.5) for x in (q, moved))
    reference = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum(-1).mean()
    assert reference < 1e-6
    torch.testing.assert_close(attention_divergence(q, k, moved, k).mean(), reference, rtol=5e-3, atol=0)


def test_other_tokens_are_refused() -> None:
    q, k = draw(0)
    with pytest.raises(ValueError, match="differ"):
        attention_divergence(q, k, q[:, :, 1:], k)
    with pytest.raises(ValueError, match="differ"):
        attention_divergence(q, k, q, k[:, :, 1:])
