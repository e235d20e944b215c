"""Rotary tables from position ids, so that any positions are exact under packing and context parallelism."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Angles position x frequency for every token of this rank, in the form Megatron's attention takes.

    Args:
        positions: position ids, any shape with `tokens` elements, in the order of the tokens.
        inverse_frequencies: [head_dim // 2], radians per position, fp32.

    Returns:
        [tokens, 1, 1, head_dim] fp32; the two halves of the last dim are equal (the rotate-half convention).
    """
    angles = torch.outer(positions.reshape(-1).float(), inverse_frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
