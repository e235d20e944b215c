from collections.abc import Callable

import pytest
import torch

from longred_megatron.layout import Parallel
from longred_megatron.parallel.context import cut_for_context_rank, gather_sequences, pieces
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks


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


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_are_what_a_rank_gets_of_a_sequence(size: int) -> None:
    for rank in range(size):
        [early, late] = pieces(16, rank, size)
        expected = cut_for_context_rank(torch.arange(16).view(1, 16), rank, size, whole_sequences=False)
        assert [*range(*early), *range(*late)] == expected[0].tolist()


def gather_on_context_ranks(join: Callable[[str], None], size: int) -> None:
    """What each rank runs: its pieces of 3 sequences of 16 tokens, put together again, and the gradient back."""
    join("world")
    groups = initialize(Parallel(context=size), seed=1)
    whole, weight = torch.arange(3 * 16 * 2 * 5.0).view(3, 16, 2, 5), torch.randn(3, 16, 2, 5).double()
    torch.distributed.broadcast(weight, 0)
    rank = groups.cp.rank()
    local = cut_for_context_rank(whole, rank, size, whole_sequences=False).reshape(-1, 1, 2, 5).requires_grad_()
    gathered = gather_sequences(local, 3, groups.cp)
    assert gathered.equal(whole)
    [gradient] = torch.autograd.grad((gathered * weight * (rank + 1)).sum(), [local])
    expected = cut_for_context_rank(weight * sum(range(size + 1)), rank, size, whole_sequences=False)
    torch.testing.assert_close(gradient, expected.reshape(-1, 1, 2, 5).float())
    destroy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathered_sequences_are_whole_and_their_gradients_are_summed(size: int) -> None:
    run_ranks(gather_on_context_ranks, size, size)
