import pytest
import torch

from longred_megatron.parallel.context import cut_for_context_rank


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("whole_sequences", [True, False])
def test_the_ranks_share_the_tokens_evenly(size: int, whole_sequences: bool) -> None:
    x = torch.arange(8 * 16).view(8, 16)
    parts = [cut_for_context_rank(x, rank, size, whole_sequences) for rank in range(size)]
    assert all(part.numel() == x.numel() // size for part in parts)
    assert torch.cat([part.flatten() for part in parts]).sort().values.equal(x.flatten())


def test_zigzag_gives_every_rank_an_early_and_a_late_piece_of_each_sequence() -> None:
    x = torch.arange(8).view(1, 8)
    assert cut_for_context_rank(x, 0, 2, whole_sequences=False).tolist() == [[0, 1, 6, 7]]
    assert cut_for_context_rank(x, 1, 2, whole_sequences=False).tolist() == [[2, 3, 4, 5]]


def test_whole_sequences_stay_whole() -> None:
    x = torch.arange(8).view(4, 2)
    assert cut_for_context_rank(x, 1, 2, whole_sequences=True).tolist() == [[4, 5], [6, 7]]
