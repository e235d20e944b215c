"""Fixed-length sequences from a weighted blend of indexed token files, in an order of nothing but the seed.

Megatron's own `GPTDataset` shuffles all samples of a run together, so its order changes with the number of
steps asked for. Here sample `index` is a pure function of (blend, sequence length, seed, index): a run can be
resumed at any step, made longer, or laid out over another number of replicas, and still sees the same texts.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longred_megatron.data.indexed import IndexedDocuments, check_marks, damaged, num_tokens_in, open_indexed
from longred_megatron.data.interleaving import Interleaving
from longred_megatron.data.shuffle import MOST_STORED, Order, permutation, shuffled
from longred_megatron.data.tokenizer import MAX_VOCAB_SIZE
from longred_megatron.errors import UserError
from longred_megatron.files import read_json, reason

# Two epochs of a set are kept: a micro-batch may lie across the border of two.
EPOCHS_KEPT = 2
SCAN_BLOCK_TOKENS = 1 << 24
MAX_REPORT_BYTES = 1 << 27  # of PREFIX.json, which has a few kilobytes and the names of the inputs


def check_tokens(prefix: str, vocab_size: int) -> None:
    """Checks that the set is as it was written, and that a model with `vocab_size` embeddings knows its tokens.

    Both are read from PREFIX.json. Files up to 64 MiB are compared whole, larger ones by size and a sample, see
    `file_mark`; sets of versions that did not mark them, not at all. A set made by another tool has no report, and its
    tokens are scanned instead.

    Raises: `UserError` if a file is damaged, or the set was made with a larger vocabulary (fewer entries are normal:
    models pad their embeddings), or PREFIX.json is damaged.
    """
    report = Path(f"{prefix}.json")
    if report.is_file():
        used, marks = _read_report(report)
        if marks is not None:
            check_marks(prefix, marks)
    else:
        used = _largest_token(prefix) + 1
    if used > vocab_size:
        raise UserError(
            f"data prefix {prefix}: its tokens are of a vocabulary of {used}, but the model has "
            f"{vocab_size} embeddings; prepare the texts with the model's own tokenizer "
            "(tools/prepare_data.py --tokenizer)"
        )


def without_start_token(prefix: str) -> bool:
    """Whether the tokenizer of a set opens a text with a start token, as evaluation does, and the set's documents do
    not begin with it. False where PREFIX.json does not say."""
    try:
        report = read_json(Path(f"{prefix}.json"), MAX_REPORT_BYTES)
        return report["start_token"] is not None and not report["starts_documents"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _read_report(report: Path) -> tuple[int, dict[str, Any] | None]:
    """The vocabulary's size and the marks of the files, None before these were kept."""
    try:
        with report.open("rb") as file:
            content = json.loads(file.read(MAX_REPORT_BYTES))
        vocab_size, marks = content["vocab_size"], content.get("files")
        if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {str(vocab_size)[:80]}, not an integer from 1 to {MAX_VOCAB_SIZE}")
        if not (marks is None or isinstance(marks, dict)):
            raise ValueError(f"files is {str(marks)[:80]}, not an object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{report}: no report of prepare_data ({type(error).__name__}: {reason(error)}); make the set again, or "
            "remove this file to have the tokens themselves looked through"
        ) from None
    return vocab_size, marks


def _largest_token(prefix: str) -> int:
    dataset = open_indexed(prefix)
    num_tokens, largest = num_tokens_in(dataset), -1
    for start in range(0, num_tokens, SCAN_BLOCK_TOKENS):
        block = dataset.get(0, offset=start, length=min(SCAN_BLOCK_TOKENS, num_tokens - start))
        if block.min() < 0:
            raise damaged(prefix, f"{prefix}.bin has a token {block.min()}")
        largest = max(largest, int(block.max()))
    return largest


class _Epoch(Protocol):
    """One pass over a set, all tokens end to end. pieces: the order in which its pieces are used."""

    pieces: Order

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start ... stop - 1 of the pass."""

    def starts_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens start + 1 ... stop - 1 at which a document begins."""


class _ShuffledDocuments:
    """A pass over documents in an order that is stored."""

    def __init__(self, documents: IndexedDocuments, bits: np.random.PCG64, num_pieces: int) -> None:
        self._documents = documents
        self._order = documents.table[permutation(bits, len(documents.table.lengths))]
        self._ends = np.cumsum(self._order.lengths)
        self.pieces = shuffled(bits, num_pieces)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        tokens = np.empty(stop - start, dtype=np.int64)
        at, place = start, int(np.searchsorted(self._ends, start, side="right"))
        while at < stop:
            end = int(self._ends[place])
            length = min(end, stop) - at
            first = int(self._order.starts[place] + self._order.lengths[place]) - (end - at)
            tokens[at - start : at - start + length] = self._documents.read(first, first + length)
            at, place = at + length, place + 1
        return tokens

    def starts_between(self, start: int, stop: int) -> NDArray[np.int64]:
        first, last = np.searchsorted(self._ends, [start + 1, stop])
        return self._ends[first:last]


class _AsInFile:
    """A pass over too many documents to keep an order of them: their order is the file's, and the pieces begin at
    another token in each pass."""

    def __init__(self, documents: IndexedDocuments, bits: np.random.PCG64, num_pieces: int, spare: int) -> None:
        """spare: the tokens that no piece has."""
        self._documents, self._shift = documents, int(bits.random_raw()) % (spare + 1)
        self.pieces = shuffled(bits, num_pieces)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        return self._documents.read(self._shift + start, self._shift + stop).astype(np.int64)

    def starts_between(self, start: int, stop: int) -> NDArray[np.int64]:
        return self._documents.between(self._shift + start + 1, self._shift + stop).starts - self._shift


class IndexedSequences:
    """The endless series of sequences of one indexed data set.

    Every epoch permutes the documents, lays them end to end and cuts consecutive pieces of
    `sequence_length + 1` tokens; the last token of a piece is the first of the next, so that each token is
    predicted once. The pieces are used in a permuted order; what is left at an epoch's end is dropped.

    Documents of a set that has more than `MOST_STORED` stay in the order of the file, and its last piece is dropped.
    Memory and time of a sample then depend on the sequence length alone.

    Raises: `UserError` for missing or damaged files and for fewer than `sequence_length + 1` tokens.
    """

    def __init__(self, prefix: str, sequence_length: int, seed: tuple[int, ...]) -> None:
        self.prefix = prefix
        self.sequence_length = sequence_length
        self._seed = seed
        self._documents = IndexedDocuments(prefix)
        self._is_large = self._documents.num_documents > MOST_STORED
        num_tokens = self._documents.num_tokens
        self.pieces_per_epoch = (num_tokens - 1) // sequence_length
        if self.pieces_per_epoch < 1:
            raise UserError(
                f"data prefix {prefix}: its {num_tokens} tokens are too few for one sequence; "
                f"sequence_length {sequence_length} needs {sequence_length + 1}: give more text or a smaller "
                "sequence_length"
            )
        if self._is_large:
            self.pieces_per_epoch = max(1, self.pieces_per_epoch - 1)  # room for the shift
        self._epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._draw_epoch)

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Sample 0, 1, ... of the series: tokens [sequence_length + 1]."""
        epoch, start = self._place(sample)
        return epoch.read(start, start + self.sequence_length + 1)

    def document_lengths(self, sample: int) -> tuple[int, ...]:
        """How many of the sequence_length + 1 tokens of a sample each of its documents has, in their order."""
        epoch, start = self._place(sample)
        stop = start + self.sequence_length + 1
        return tuple(np.diff(np.concatenate([[start], epoch.starts_between(start, stop), [stop]])).tolist())

    def padding_fraction(self) -> None:
        """There is no padding to speak of."""

    def _place(self, sample: int) -> tuple[_Epoch, int]:
        """A sample's epoch and its first token there."""
        number, place = divmod(sample, self.pieces_per_epoch)
        epoch = self._epoch(number)
        return epoch, int(epoch.pieces[place]) * self.sequence_length

    def _draw_epoch(self, number: int) -> _Epoch:
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, number]))
        if not self._is_large:
            return _ShuffledDocuments(self._documents, bits, self.pieces_per_epoch)
        spare = self._documents.num_tokens - 1 - self.pieces_per_epoch * self.sequence_length
        return _AsInFile(self._documents, bits, self.pieces_per_epoch, spare)


class DocumentSequences:
    """As `IndexedSequences`, with the lengths of the documents: samples are (tokens, lengths), of s + 1 tokens each."""

    def __init__(self, prefix: str, sequence_length: int, seed: tuple[int, ...]) -> None:
        self.prefix = prefix
        self._sequences = IndexedSequences(prefix, sequence_length, seed)

    def __getitem__(self, sample: int) -> tuple[NDArray[np.int64], tuple[int, ...]]:
        return self._sequences[sample], self._sequences.document_lengths(sample)

    def padding_fraction(self) -> None:
        """There is no padding to speak of."""


class Series[Sample](Protocol):
    """An endless series of samples of the data set `prefix`."""

    prefix: str

    def __getitem__(self, sample: int) -> Sample: ...

    def padding_fraction(self) -> float | None:
        """Padding's share of its tokens, estimated; None: there is none by design."""


class SequenceSource[Sample]:
    """Sequences from a weighted blend of indexed token files.

    Sample `index` (0, 1, ..., without end) is a pure function of (series, blend, sequence_length, seed, index): of no
    step count, batch size, replica count or cache. `Interleaving` says which set it comes from, `series` which tokens.

    Args:
        series: makes the series of one set from (prefix, sequence_length, seed): `IndexedSequences` and the like.
        blend: prefix of the files of each set -> its share of the samples, in any unit.
        sequence_length: in tokens.
        seed: a non-negative integer. A set's own order is keyed by it and by the set's place in the blend, so
            files may be moved.

    Raises: `UserError` for an empty blend, weights that are not positive numbers, and for what `series` raises; all in
    one.
    """

    def __init__(
        self,
        series: Callable[[str, int, tuple[int, ...]], Series[Sample]],
        blend: Mapping[str, float],
        sequence_length: int,
        seed: int,
    ) -> None:
        if not blend:
            raise UserError("a data blend names no set; give at least one `prefix: weight`")
        problems = [
            f"data prefix {prefix}: its weight is {weight}; give a positive number"
            for prefix, weight in blend.items()
            if not (math.isfinite(weight) and weight > 0)
        ]
        self.sets: list[Series[Sample]] = []
        for place, prefix in enumerate(blend):
            try:
                self.sets.append(series(prefix, sequence_length, (seed, place)))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        self._interleaving = Interleaving(list(blend.values()))

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of the blend."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are numbered from 0")
        chosen, sample = self._interleaving[index]
        return self.sets[chosen][sample]
