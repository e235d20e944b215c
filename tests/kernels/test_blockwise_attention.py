import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longred_megatron.kernels.blockwise_attention import blockwise_attention

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 6, 2, 23, 8


def draw(dtype: torch.dtype = torch.float32, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(heads, TOKENS, HEAD_DIM, generator=generator).to(dtype) for heads in sizes)
    return size * query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]


@pytest.mark.parametrize("block", [1, 5, 23, 64])
@pytest.mark.parametrize("start", [0, 9, 22])
def test_it_is_torchs_attention(block: int, start: int) -> None:
    query, key, value = draw()
    blocks = zip(key.split(block, 1), value.split(block, 1), strict=True)
    found = blockwise_attention(query[:, start:], blocks, 0.4, start)
    torch.testing.assert_close(found, plain(query, key, value, 0.4)[:, start:], rtol=1e-5, atol=1e-6)


def test_scores_may_be_large() -> None:
    query, key, value = draw(size=1e4)
    blocks = zip(key.split(4, 1), value.split(4, 1), strict=True)
    torch.testing.assert_close(blockwise_attention(query, blocks, 1.0, 0), plain(query, key, value, 1.0))


def test_bf16_is_computed_in_fp32() -> None:
    query, key, value = draw(torch.bfloat16)
    blocks = zip(key.split(4, 1), value.split(4, 1), strict=True)
    found = blockwise_attention(query, blocks, 0.4, 0)
    assert found.dtype == torch.bfloat16
    exact = plain(query.float(), key.float(), value.float(), 0.4)
    assert (found != exact.bfloat16()).float().mean() < 0.01  # where a sum in another order rounds to the other side
