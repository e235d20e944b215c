"""Position ids of a micro-batch: natural ones, skipped ones over a longer window, and perturbed ones.

A text of T tokens gets T ids out of a target window of L > T: the head keeps the first ids, the tail gets
the last ids of the window, and the middle is one contiguous run that is shifted to end at a random id. The
model thus sees relative distances up to L - 1 on a text of T tokens.

Source: LongReD (arXiv 2502.07365) and its released code for the numbers; CREAM (arXiv 2406.07138) for the
truncated Gaussian of the middle.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Generator, Tensor

# The two shapes of head and tail, of which a coin chooses one per micro-batch: T // 3, or 4 * (L // T).
HEAD_FRACTION = 3
HEAD_PER_FACTOR = 4
# CREAM's Gaussian over [2, 2 * factor]: mean 1 + factor, this deviation, a table of this many points.
CREAM_SIGMA = 5.0
CREAM_TABLE_POINTS = 1000

KINDS = ("natural", "uniform", "cream")


def draw(kind: str, num_sequences: int, sequence_length: int, target_window: int, generator: Generator) -> Tensor:
    """Position ids [num_sequences, sequence_length] (int64) of the sampler `kind`; natural draws nothing.

    Raises ValueError for a kind not in `KINDS`.
    """
    if kind == "natural":
        return natural(num_sequences, sequence_length)
    if kind == "uniform":
        return uniform(num_sequences, sequence_length, target_window, generator)
    if kind == "cream":
        return cream(num_sequences, sequence_length, target_window, generator)
    raise ValueError(f"positions {kind!r} are not known; choose one of {', '.join(KINDS)}")


def natural(num_sequences: int, sequence_length: int) -> Tensor:
    """0, 1, ..., sequence_length - 1 for each sequence: [num_sequences, sequence_length], int64."""
    return torch.arange(sequence_length).repeat(num_sequences, 1)


def ends(lengths: Sequence[int]) -> list[int]:
    """The place of each document's last token in a sequence of documents of `lengths` tokens."""
    return [end - 1 for end in accumulate(lengths)]


def uniform(num_sequences: int, sequence_length: int, target_window: int, generator: Generator) -> Tensor:
    """LongReD-U: the middle ends at an id drawn uniformly from [T - tail, L - tail - 1], one per sequence.

    L = target_window, T = sequence_length, both in tokens. Returns [num_sequences, sequence_length] (int64),
    strictly increasing in [0, L - 1]; L == T gives natural positions. Raises ValueError when L < T or T < 3.
    """
    if target_window == sequence_length:
        return natural(num_sequences, sequence_length)
    edge = _draw_edge(sequence_length, target_window, generator)
    # Not empty, as L > T. Increasing: the middle starts at end - (T - 2 * edge) + 1 >= edge + 1.
    first = torch.full((num_sequences,), sequence_length - edge)
    last = torch.full((num_sequences,), target_window - edge - 1)
    return _assemble(_draw_between(first, last, generator), edge, sequence_length, target_window)


def cream(num_sequences: int, sequence_length: int, target_window: int, generator: Generator) -> Tensor:
    """LongReD-C: `draw_stretch` gives r, then the middle ends at an id drawn uniformly, one a sequence, from
    [head + (len_chunk - 1) * r/2, r/2 * T - tail - 1], both included, where len_chunk = T - head - tail.

    L = target_window, T = sequence_length, both in tokens. Returns [num_sequences, sequence_length] (int64),
    strictly increasing in [0, L - 1]; L == T gives natural positions. Raises ValueError when L < T or T < 3.
    """
    if target_window == sequence_length:
        return natural(num_sequences, sequence_length)
    edge = _draw_edge(sequence_length, target_window, generator)
    chunk = sequence_length - 2 * edge
    r = draw_stretch(num_sequences, target_window // sequence_length, generator)
    # Odd r halves to x.5; both bounds are rounded down. Never empty: before rounding
    #   last - first = (r/2) * (T - chunk + 1) - (2 * edge + 1) = (r/2 - 1) * (2 * edge + 1) >= 0   (r >= 2),
    # and floor(b) >= floor(a) for b >= a.
    # Increasing: first >= edge + chunk - 1 (so the middle starts at or after id `edge`), and
    # last <= factor * T - edge - 1 <= L - edge - 1 (so it ends before the tail).
    first = edge + (chunk - 1) * r // 2
    last = sequence_length * r // 2 - edge - 1
    return _assemble(_draw_between(first, last, generator), edge, sequence_length, target_window)


def skip(num_sequences: int, sequence_length: int, longest_skip: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Natural ids i for i < s, i + y from s on; s ~ U[0, T - 1] and y ~ U[1, longest_skip], drawn for each sequence.

    T = sequence_length. Source: RoPE-Perturbed Self-Distillation (arXiv 2604.14339), where longest_skip is T.

    Returns:
        Ids [num_sequences, T] (int64) in [0, T + longest_skip - 1], and s [num_sequences]: tokens before s have their
        natural ids.
    """
    start = torch.randint(sequence_length, (num_sequences,), generator=generator)
    distance = torch.randint(1, longest_skip + 1, (num_sequences,), generator=generator)
    ids = natural(num_sequences, sequence_length)
    return ids + distance[:, None] * (ids >= start[:, None]), start


def cyclic(num_sequences: int, sequence_length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Ids (i + u) mod T; u ~ U[1, T - 1], drawn for each sequence; T = sequence_length of at least 2.

    Source: RoPE-Perturbed Self-Distillation (arXiv 2604.14339), its cyclic variant.

    Returns:
        Ids [num_sequences, T] (int64) in [0, T - 1], and the place s = T - u [num_sequences] of id 0: tokens before it
        see all tokens before them at their natural distances.
    """
    shift = torch.randint(1, sequence_length, (num_sequences,), generator=generator)
    ids = natural(num_sequences, sequence_length)
    return (ids + shift[:, None]) % sequence_length, sequence_length - shift


def draw_stretch(num_sequences: int, factor: int, generator: Generator) -> Tensor:
    """Integers r in [2, 2 * factor], [num_sequences] (int64): twice the stretch of each sequence's middle.

    u ~ U(0, 1) goes through the inverse of the normal CDF (mean 1 + factor, deviation 5), tabulated at 1000
    points of [2, 2 * factor] and interpolated linearly; the result is truncated. Outside the table u clips to
    its ends, so r = 2 and r = 2 * factor carry the normal's tails: at factor 4 P(r = 2) = 0.345 and
    P(r = 8) = 0.274.
    """
    if factor == 1:  # [2, 2]: the table is one point
        return torch.full((num_sequences,), 2)
    x = torch.linspace(2, 2 * factor, CREAM_TABLE_POINTS, dtype=torch.float64)
    cdf = torch.special.ndtr((x - (1 + factor)) / CREAM_SIGMA)
    u = torch.rand(num_sequences, dtype=torch.float64, generator=generator).clamp(cdf[0], cdf[-1])
    above = torch.searchsorted(cdf, u).clamp(min=1)
    below = above - 1
    # lerp is exact at both ends: a clipped u truncates to 2 * factor, not to one less.
    return torch.lerp(x[below], x[above], (u - cdf[below]) / (cdf[above] - cdf[below])).long()


def _draw_edge(sequence_length: int, target_window: int, generator: Generator) -> int:
    """Length in tokens of the head, and of the tail: one fair coin flip for the whole micro-batch."""
    if target_window < sequence_length:
        raise ValueError(
            f"the target window ({target_window}) is shorter than the sequences ({sequence_length} tokens); "
            "skipped positions need a window of at least the sequence length"
        )
    if sequence_length < HEAD_FRACTION:
        raise ValueError(
            f"sequences of {sequence_length} tokens have no room for a head, a middle and a tail; "
            f"skipped positions need at least {HEAD_FRACTION} tokens"
        )
    third = sequence_length // HEAD_FRACTION
    short = HEAD_PER_FACTOR * (target_window // sequence_length)
    if bool(torch.randint(2, (1,), generator=generator)):
        return third
    # A sequence too short to keep a middle between two such edges has only the other shape.
    return short if 2 * short < sequence_length else third


def _draw_between(first: Tensor, last: Tensor, generator: Generator) -> Tensor:
    """Uniform integers, first[i] <= result[i] <= last[i]. The remainder's bias is below 2**-40."""
    return first + torch.randint(2**62, first.shape, generator=generator) % (last - first + 1)


def _assemble(end: Tensor, edge: int, sequence_length: int, target_window: int) -> Tensor:
    """Head 0..edge-1, middle up to end [num_sequences], tail L-edge..L-1: [num_sequences, T]."""
    positions = torch.arange(sequence_length).repeat(end.numel(), 1)
    positions[:, sequence_length - edge :] += target_window - sequence_length
    middle = slice(edge, sequence_length - edge)
    positions[:, middle] += (end - (sequence_length - edge - 1)).unsqueeze(1)
    return positions
