"""Which set each sample of a weighted blend comes from."""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

BLOCK_SAMPLES = 4096


class Interleaving:
    """The order of the sets of a blend: of any first g samples, set i gives g * w_i / sum(w), off by < 1.

    This is the chairman assignment problem, solved as in Tijdeman (1980), Discrete Mathematics 32. With n
    sets and d = 1 / (2n - 2), sample k (from 0) of a set with share w may be taken from slot
    ceil((k + d) / w) and must be by slot floor((k + 1 - d) / w) + 1 (slots from 1); of the samples allowed,
    the most urgent goes first. The deviation is at most 1 - d. To sort samples by (k + 1/2) / w would be
    simpler, but sets of like weights then come in bunches: with weights .9 and ten times .01 it is up to 4.5
    samples off. All arithmetic is in integers, so the order is the same on every machine.

    Args:
        weights: one a set, positive, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(weight) for weight in weights]
        unit = lcm(*(share.denominator for share in shares))
        self._num_sets = len(shares)
        self._sets = _most_urgent_first([int(share * unit) for share in shares])
        self._blocks: list[NDArray[np.int32]] = []  # the set of each sample, grown when asked for
        self._counts = [np.zeros(self._num_sets, dtype=np.int64)]  # samples of each set before each block

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The set of sample `index`, and how many samples of that set come before it."""
        if self._num_sets == 1:
            return 0, index
        block, place = divmod(index, BLOCK_SAMPLES)
        while len(self._blocks) <= block:
            self._blocks.append(np.fromiter(self._sets, dtype=np.int32, count=BLOCK_SAMPLES))
            self._counts.append(self._counts[-1] + np.bincount(self._blocks[-1], minlength=self._num_sets))
        sets = self._blocks[block]
        chosen = int(sets[place])
        return chosen, int(self._counts[block][chosen]) + int(np.count_nonzero(sets[:place] == chosen))


def _most_urgent_first(weights: list[int]) -> Iterator[int]:
    """The set of slot 1, 2, ...; ties go to the set named first. Needs two sets or more."""
    total = sum(weights)
    inverse_d = 2 * len(weights) - 2

    def first_slot(chosen: int, sample: int) -> int:
        return -(-(sample * inverse_d + 1) * total // (inverse_d * weights[chosen]))

    def last_slot(chosen: int, sample: int) -> int:
        return ((sample + 1) * inverse_d - 1) * total // (inverse_d * weights[chosen]) + 1

    waiting = [(first_slot(chosen, 0), chosen, 0) for chosen in range(len(weights))]
    heapq.heapify(waiting)
    allowed: list[tuple[int, int, int]] = []
    slot = 0
    while True:
        slot += 1
        while waiting and waiting[0][0] <= slot:
            _, chosen, sample = heapq.heappop(waiting)
            heapq.heappush(allowed, (last_slot(chosen, sample), chosen, sample))
        _, chosen, sample = heapq.heappop(allowed)
        yield chosen
        heapq.heappush(waiting, (first_slot(chosen, sample + 1), chosen, sample + 1))
