"""Short documents packed into windows: by best fit, so that next to nothing is padding and no document is cut."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from longred_megatron.data.sequences import EPOCHS_KEPT, IndexedDocuments, permutation
from longred_megatron.errors import UserError

# Documents are packed in blocks of about as many windows: the few windows that stay half empty hardly count (0.2 %),
# and a run plans only the blocks it reaches.
BLOCK_WINDOWS = 256
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


@dataclass(frozen=True)
class _Block:
    """Documents that are packed together, longer ones in pieces of a window, and which pieces each window holds."""

    documents: NDArray[np.int64]  # [pieces]
    offsets: NDArray[np.int64]  # [pieces], of the piece in its document
    lengths: NDArray[np.int64]  # [pieces]
    windows: list[list[int]]


class PackedSequences:
    """The endless series of windows that hold the documents of one indexed data set.

    Every epoch permutes the documents, divides them into blocks, and packs each by best fit; the windows of a block
    come in a permuted order. No token is lost or used twice in an epoch. Only documents longer than a window are cut.

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
        pieces = block.windows[sample - self._first_samples[number]]
        tokens = np.full(self._window, PADDING, dtype=np.int64)
        ends = np.cumsum(block.lengths[pieces])
        for piece, end in zip(pieces, ends, strict=True):
            length = int(block.lengths[piece])
            document, offset = int(block.documents[piece]), int(block.offsets[piece])
            tokens[end - length : end] = self._documents.read(document, offset, length)
        return Pack(tokens, tuple(block.lengths[pieces].tolist()))

    def padding_fraction(self) -> float:
        """Padding's share of the tokens of the first block."""
        block = self._block(0)
        return 1 - int(block.lengths.sum()) / (len(block.windows) * self._window)

    def _draw_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents in the epoch's order, and the first document of each block in it (and the end)."""
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, epoch]))
        order = permutation(bits, len(self._documents.lengths))
        ends = np.cumsum(self._documents.lengths[order])
        borders = np.arange(self._num_blocks) * self._documents.num_tokens // self._num_blocks
        return order, np.append(np.searchsorted(ends, borders, side="right"), len(order))

    def _pack_block(self, number: int) -> _Block:
        epoch, place = divmod(number, self._num_blocks)
        order, borders = self._order(epoch)
        documents = order[borders[place] : borders[place + 1]]
        lengths = self._documents.lengths[documents]
        pieces = -(-lengths // self._window)  # of each document
        first_pieces = np.repeat(np.cumsum(pieces) - pieces, pieces)
        offsets = (np.arange(pieces.sum()) - first_pieces) * self._window
        lengths = np.minimum(np.repeat(lengths, pieces) - offsets, self._window)
        windows = best_fit(lengths.tolist(), self._window)
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, epoch, place]))
        in_order = [windows[i] for i in permutation(bits, len(windows))]
        return _Block(np.repeat(documents, pieces), offsets, lengths, in_order)
