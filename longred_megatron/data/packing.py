"""Short documents packed into windows: by best fit, so that next to nothing is padding and no document is cut."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longred_megatron.data.indexed import Documents, IndexedDocuments
from longred_megatron.data.sequences import EPOCHS_KEPT
from longred_megatron.data.shuffle import MOST_STORED, permutation, shuffled
from longred_megatron.errors import UserError

# Documents are packed in blocks of about as many windows: the few windows that stay half empty hardly count (0.2 %),
# and a run plans only the blocks it reaches.
BLOCK_WINDOWS = 256
RUNS_PER_BLOCK = 64
PADDING = 0  # the token id behind the last document; it has no label, and no document comes after it


@dataclass(frozen=True)
class Pack:
    """One window: tokens [window], of which the first sum(lengths) are the documents, the others padding."""

    tokens: NDArray[np.int64]
    lengths: tuple[int, ...]

    @property
    def num_padding(self) -> int:
        return len(self.tokens) - sum(self.lengths)


def best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Windows as lists of places in `lengths`: best-fit decreasing, O(n log n) for n documents.

    The longest document comes first; each goes where the least room is left that holds it (Johnson et al. 1974, SIAM
    J. Comput. 3(4): at most 11/9 of the fewest windows possible, and 4 more). Within a window the places ascend.

    Raises ValueError for a length that is not in 1 ... window.
    """
    if lengths and not (min(lengths) >= 1 and max(lengths) <= window):
        raise ValueError(f"lengths {min(lengths)} to {max(lengths)}: must be between 1 and the window of {window}")
    windows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, window), ascending
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[place]
        fit = bisect_left(rooms, (length, 0))
        if fit < len(rooms):
            free, number = rooms.pop(fit)
        else:
            free, number = window, len(windows)
            windows.append([])
        windows[number].append(place)
        if free > length:
            insort(rooms, (free - length, number))
    return [sorted(places) for places in windows]


class _Order(Protocol):
    """One pass over a set's documents, block by block."""

    def block(self, place: int) -> Documents:
        """The documents that are packed together."""


class _ShuffledDocuments:
    """A pass over documents in an order that is stored, cut where a block's share of the tokens ends."""

    def __init__(self, documents: IndexedDocuments, bits: np.random.PCG64, num_blocks: int) -> None:
        self._order = documents.table[permutation(bits, len(documents.table.lengths))]
        borders = np.arange(num_blocks) * documents.num_tokens // num_blocks
        firsts = np.searchsorted(np.cumsum(self._order.lengths), borders, side="right")
        self._firsts = np.append(firsts, len(self._order.lengths))  # of each block, and the end

    def block(self, place: int) -> Documents:
        return self._order[self._firsts[place] : self._firsts[place + 1]]


class _ShuffledRuns:
    """A pass over too many documents to keep an order of them: each block has 64 runs of neighbours from anywhere in
    the file, others in each pass."""

    def __init__(self, documents: IndexedDocuments, bits: np.random.PCG64, num_blocks: int) -> None:
        self._documents, self._num_runs = documents, num_blocks * RUNS_PER_BLOCK
        self._runs = shuffled(bits, self._num_runs)

    def block(self, place: int) -> Documents:
        runs = [int(self._runs[i]) for i in range(place * RUNS_PER_BLOCK, (place + 1) * RUNS_PER_BLOCK)]
        total = self._documents.num_tokens
        parts = [
            self._documents.between(run * total // self._num_runs, (run + 1) * total // self._num_runs) for run in runs
        ]
        starts, lengths = [part.starts for part in parts], [part.lengths for part in parts]
        return Documents(np.concatenate(starts), np.concatenate(lengths))


@dataclass(frozen=True)
class _Block:
    """Documents that are packed together, longer ones in pieces of a window, and which pieces each window holds."""

    pieces: Documents
    windows: list[list[int]]


class PackedSequences:
    """The endless series of windows that hold the documents of one indexed data set.

    Every epoch permutes the documents, divides them into blocks, and packs each by best fit; the windows of a block
    come in a permuted order. No token is lost or used twice in an epoch. Only documents longer than a window are cut.
    Of a set of more than `MOST_STORED` documents, runs of neighbours are permuted.

    Raises: `UserError` for missing or damaged files and for fewer tokens than a window.
    """

    def __init__(self, prefix: str, sequence_length: int, seed: tuple[int, ...]) -> None:
        self.prefix = prefix
        self._documents = IndexedDocuments(prefix)
        self._window = sequence_length
        self._seed = seed
        num_tokens = self._documents.num_tokens
        if num_tokens < sequence_length:
            raise UserError(
                f"data prefix {prefix}: its {num_tokens} tokens do not fill one window of {sequence_length}; give more "
                "text or a smaller sequence_length"
            )
        self._num_blocks = max(1, round(num_tokens / sequence_length / BLOCK_WINDOWS))  # of an epoch
        self._order = lru_cache(maxsize=EPOCHS_KEPT)(self._draw_order)
        self._block = lru_cache(maxsize=EPOCHS_KEPT)(self._pack_block)
        self._first_samples = [0]  # of each block known so far, and of the one after them

    def __getitem__(self, sample: int) -> Pack:
        """Window 0, 1, ... of the series."""
        while self._first_samples[-1] <= sample:
            block = self._block(len(self._first_samples) - 1)
            self._first_samples.append(self._first_samples[-1] + len(block.windows))
        number = bisect_right(self._first_samples, sample) - 1
        block = self._block(number)
        pieces = block.pieces[block.windows[sample - self._first_samples[number]]]
        tokens = np.full(self._window, PADDING, dtype=np.int64)
        at = 0
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
            tokens[at : at + length] = self._documents.read(start, start + length)
            at += length
        return Pack(tokens, tuple(pieces.lengths.tolist()))

    def padding_fraction(self) -> float:
        """Padding's share of the tokens of the first block."""
        block = self._block(0)
        return 1 - int(block.pieces.lengths.sum()) / (len(block.windows) * self._window)

    def _draw_order(self, epoch: int) -> _Order:
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, epoch]))
        is_large = self._documents.num_documents > MOST_STORED
        return (_ShuffledRuns if is_large else _ShuffledDocuments)(self._documents, bits, self._num_blocks)

    def _pack_block(self, number: int) -> _Block:
        epoch, place = divmod(number, self._num_blocks)
        documents = self._order(epoch).block(place)
        counts = -(-documents.lengths // self._window)  # pieces of each document
        first_pieces = np.repeat(np.cumsum(counts) - counts, counts)
        offsets = (np.arange(counts.sum()) - first_pieces) * self._window
        starts = np.repeat(documents.starts, counts) + offsets
        lengths = np.minimum(np.repeat(documents.lengths, counts) - offsets, self._window)
        windows = best_fit(lengths.tolist(), self._window)
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, epoch, place]))
        in_order = [windows[i] for i in permutation(bits, len(windows))]
        return _Block(Documents(starts, lengths), in_order)
