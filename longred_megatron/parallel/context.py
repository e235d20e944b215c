"""Cuts a micro-batch for one rank of the context-parallel axis, and puts sequences together again."""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def pieces(sequence_length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """The (start, stop) of this rank's two pieces of a sequence that `size` ranks share.

    A sequence is cut into 2 x size pieces and the rank gets pieces `rank` and `2 x size - 1 - rank` (zig-zag), so that
    all ranks have equal work under a causal mask (ring attention, arXiv 2310.01889; the order Transformer Engine
    expects).
    """
    length = sequence_length // (2 * size)
    return [(i * length, (i + 1) * length) for i in (rank, 2 * size - 1 - rank)]


def cut_for_context_rank(x: Tensor, rank: int, size: int, whole_sequences: bool) -> Tensor:
    """This rank's part of `x` [sequences, sequence_length]; either way 1/size of the tokens.

    whole_sequences: a run of neighbouring sequences, whose attention needs no communication. Otherwise the rank gets
    its two `pieces` of each sequence.
    """
    if size == 1:
        return x
    if whole_sequences:
        return x.chunk(size, dim=0)[rank]
    return torch.cat([x[:, start:stop] for start, stop in pieces(x.shape[1], rank, size)], dim=1)


def gather_sequences(x: Tensor, num_sequences: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """Whole sequences in their natural order, out of the `pieces` that each rank holds.

    One all-gather over `group`, the context ranks that share the sequences. In the backward pass one reduce-scatter
    over the same ranks: each gets the gradient of its own tokens, summed over what all ranks used them for.

    Args:
        x: [local tokens, 1, ...], this rank's two pieces of every sequence, sequence after sequence.

    Returns:
        [sequences, sequence_length, ...], the same on every rank.
    """
    size = group.size()
    gathered = gather_from_sequence_parallel_region(x, group=group)
    # [ranks, sequences, first or second piece, piece length, ...]
    parts = gathered.reshape(size, num_sequences, 2, -1, *x.shape[2:])
    order = [(rank, 0) for rank in range(size)] + [(rank, 1) for rank in reversed(range(size))]
    return torch.cat([parts[rank, :, piece] for rank, piece in order], dim=1)
