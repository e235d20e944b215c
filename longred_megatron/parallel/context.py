"""Cuts a micro-batch for one rank of the context-parallel axis."""

import torch
from torch import Tensor


def cut_for_context_rank(x: Tensor, rank: int, size: int, whole_sequences: bool) -> Tensor:
    """This rank's part of `x` [sequences, sequence_length]; either way 1/size of the tokens.

    whole_sequences: a run of neighbouring sequences, whose attention needs no communication. Otherwise each sequence
    is cut into 2 x size pieces and the rank gets pieces `rank` and `2 x size - 1 - rank` (zig-zag), so that all ranks
    have equal work under a causal mask (ring attention, arXiv 2310.01889; the order Transformer Engine expects).
    """
    if size == 1:
        return x
    if whole_sequences:
        return x.chunk(size, dim=0)[rank]
    pieces = x.chunk(2 * size, dim=1)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]), dim=1)
