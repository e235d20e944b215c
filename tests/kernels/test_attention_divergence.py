import pytest
import torch
from torch import Tensor

from longred_megatron.kernels import attention_divergence as module
from longred_megatron.kernels.attention_divergence import attention_divergence

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 4, 2, 23, 8


def draw(seed: int, size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads, TOKENS, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    return size * query, size * key


def log_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = scale * query.double() @ key.double().transpose(1, 2)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).log_softmax(-1)


@pytest.fixture(params=[(256, 1024), (5, 3), (3, 5)], ids=["one block", "many", "others"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Keys of a block; and as many queries are taken at once as a parameter says."""
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param[0])
    keys: int = request.param[1]
    return keys


@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_the_divergence_of_plain_attention(scale: float | None, block: int) -> None:
    (q, k), (other_q, other_k) = draw(0), draw(1)
    log_p = log_probabilities(q, k, scale or HEAD_DIM**-0.5)
    log_q = log_probabilities(other_q, other_k, HEAD_DIM**-0.5)
    reference = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum(-1)
    found = attention_divergence(q, k.split(block, 1), other_q, other_k.split(block, 1), scale)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float64 and found.mean() > 0.1
    assert found[:, 0].abs().max() < 1e-6  # the first token sees itself alone


def test_queries_from_a_later_token_on(block: int) -> None:
    (q, k), (other_q, other_k) = draw(0), draw(1)
    whole = attention_divergence(q, [k], other_q, [other_k])
    found = attention_divergence(q[:, 7:], k.split(block, 1), other_q[:, 7:], other_k.split(block, 1), start=7)
    torch.testing.assert_close(found, whole[:, 7:], rtol=1e-5, atol=1e-6)


def test_an_attention_is_not_away_from_itself(block: int) -> None:
    q, k = draw(2, size=20.0)
    assert not attention_divergence(q, k.split(block, 1), q, k.split(block, 1)).any()


def test_small_differences_are_not_lost() -> None:
    q, k = draw(3)
    moved = q + 1e-3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    log_p, log_q = (log_probabilities(x, k, HEAD_DIM**-0.5) for x in (q, moved))
    reference = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum(-1).mean()
    assert reference < 1e-6
    torch.testing.assert_close(attention_divergence(q, [k], moved, [k]).mean(), reference, rtol=5e-3, atol=0)


def test_other_tokens_are_refused() -> None:
    q, k = draw(0)
    for other_query, others in ((q[:, 1:], [k]), (q, [k[:, 1:]]), (q, [])):
        with pytest.raises(ValueError, match=r"differ|shorter"):
            attention_divergence(q, [k], other_query, others)
