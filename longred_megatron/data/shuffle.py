"""Orders of numbers that depend on a seed alone: stored for small sets, computed number by number for large ones."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MOST_STORED = 1 << 22  # an order of as many takes 32 MiB and half a second
_ROUNDS = 6
_WORD = (1 << 64) - 1


class Order(Protocol):
    """0 ... size - 1 in some order."""

    def __getitem__(self, place: int) -> int | np.int64: ...


def shuffled(bits: np.random.PCG64, size: int) -> Order:
    """0 ... size - 1 in an order drawn from `bits`, the same with every version of numpy."""
    return permutation(bits, size) if size <= MOST_STORED else Shuffle(bits, size)


def permutation(bits: np.random.PCG64, size: int) -> NDArray[np.int64]:
    """As `shuffled`, stored."""
    # numpy promises the raw bits of PCG64 for all versions, but not `Generator.permutation`: a resumed run
    # may meet another numpy.
    return np.argsort(bits.random_raw(size), kind="stable")


class Shuffle:
    """As `shuffled`, computed: nothing is stored, and each number costs the same.

    A Feistel network permutes 0 ... 4^k - 1, the smallest such range that holds all; a number outside of 0 ... size - 1
    is permuted again until it is inside (Black and Rogaway, CT-RSA 2002: cycle walking), at most 4 times on average.
    """

    def __init__(self, bits: np.random.PCG64, size: int) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits
        self._keys = [int(key) for key in bits.random_raw(_ROUNDS)]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(f"place {place}: there are {self._size}")
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            place = left << half | right
            if place < self._size:
                return place


def _mixed(word: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): each bit of `word` changes half of them."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
