"""The two files of an indexed data set, PREFIX.bin and PREFIX.idx, checked before Megatron maps them."""

import struct
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longred_megatron.errors import UserError
from longred_megatron.files import reason

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# An index starts with 9 bytes of magic, version, dtype code, number of sequences, number of document borders;
# 12 bytes a sequence (length, place) and 8 a border follow.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9xQBQQ")
INDEX_VERSION = 1
# Megatron's codes of the types that hold token ids; its 6 and 7 are floats.
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Files up to 64 MiB are marked whole, which takes 0.1 s; of larger ones so many blocks of 1 MiB, evenly spread.
BLOCK_BYTES, MAX_BLOCKS = 1 << 20, 64
CHECKED_AT_ONCE = 1 << 22  # sequences


def file_mark(path: Path) -> dict[str, Any]:
    """Size and CRC-32 of a file: of all its bytes up to 64 MiB, of 64 blocks of 1 MiB of a larger one.

    Enough against accidents: of a larger file it finds any other size, and a damage that one of the blocks has.
    """
    size = path.stat().st_size
    num_blocks = min(MAX_BLOCKS, -(-size // BLOCK_BYTES))
    last_start = max(0, size - BLOCK_BYTES)
    spread = size > MAX_BLOCKS * BLOCK_BYTES
    crc = 0
    with path.open("rb") as file:
        for i in range(num_blocks):
            file.seek(last_start * i // (MAX_BLOCKS - 1) if spread else i * BLOCK_BYTES)
            crc = zlib.crc32(file.read(BLOCK_BYTES), crc)
    return {"bytes": size, "blocks": num_blocks, "crc32": f"{crc:08x}"}


def check_marks(prefix: str, marks: dict[str, Any]) -> None:
    """Compares the files with `marks`: ".bin" and ".idx" -> `file_mark` when they were written.

    Raises: `UserError` if one is not as it was written.
    """
    for suffix in (".bin", ".idx"):
        try:
            found = file_mark(Path(f"{prefix}{suffix}"))
        except OSError as error:
            raise damaged(prefix, f"{prefix}{suffix} cannot be read ({reason(error)})") from None
        if found != marks.get(suffix):
            raise damaged(
                prefix,
                f"{prefix}{suffix} is not as it was written: now {_mark_text(found)}, by {prefix}.json "
                f"{_mark_text(marks.get(suffix))}",
            )


def _mark_text(mark: Any) -> str:
    if not isinstance(mark, dict):
        return "nothing"
    return f"{mark.get('bytes')} bytes with CRC-32 {mark.get('crc32')}"


def open_indexed(prefix: str) -> "IndexedDataset":
    """Opens PREFIX.idx and PREFIX.bin as memory maps.

    Raises: `UserError` if one is missing, damaged or cut short.
    """
    try:
        missing = [f"{prefix}{suffix}" for suffix in (".idx", ".bin") if not Path(f"{prefix}{suffix}").is_file()]
        if missing:
            raise UserError(
                f"data prefix {prefix!r}: {' and '.join(missing)} not found; "
                f"make them with tools/prepare_data.py --output {prefix}, or correct the path in the recipe's "
                "section `data`"
            )
        _check_index(prefix)  # before Megatron does, whose assertions would not say what to do
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # slow to import, and only data need it

        return IndexedDataset(prefix)
    except (OSError, ValueError) as error:
        raise damaged(prefix, f"its files cannot be read ({reason(error)})") from None


def num_tokens_in(dataset: "IndexedDataset") -> int:
    """Of all sequences."""
    index = dataset.index
    return int(index.sequence_pointers[-1]) // index.dtype_size + int(index.sequence_lengths[-1])


@dataclass(frozen=True)
class Documents:
    """Some documents of a set. starts, lengths: [documents], in tokens."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, chosen: Any) -> "Documents":
        """Those that an index of numpy's chooses."""
        return Documents(self.starts[chosen], self.lengths[chosen])


class IndexedDocuments:
    """The documents of one indexed data set, end to end as in the file. No table of them is made unless asked for.

    Raises: `UserError` for missing or damaged files.
    """

    def __init__(self, prefix: str) -> None:
        self._dataset = open_indexed(prefix)
        index = self._dataset.index
        self._borders = index.document_indices  # in sequences of the file; a document may have several
        self._places, self._token_bytes = index.sequence_pointers, index.dtype_size
        self._file_tokens = num_tokens_in(self._dataset)
        self._first_token = self._file_place(0)
        self.num_documents = len(self._borders) - 1  # empty ones, too
        self.num_tokens = self._file_tokens - self._first_token

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start ... stop - 1, in the file's number format."""
        return self._dataset.get(0, self._first_token + start, stop - start)

    def between(self, start: int, stop: int) -> Documents:
        """The documents that begin at tokens start ... stop - 1, without empty ones; stop <= num_tokens."""
        first, last = (bisect_left(range(self.num_documents), token, key=self._start) for token in (start, stop))
        borders = self._borders[first : last + 1]
        places = np.full(len(borders), self._file_tokens, dtype=np.int64)
        inside = borders < len(self._places)
        places[inside] = self._places[borders[inside]] // self._token_bytes
        starts, lengths = places[:-1] - self._first_token, np.diff(places)
        return Documents(starts, lengths)[lengths > 0]

    @cached_property
    def table(self) -> Documents:
        """All of them, without empty ones."""
        return self.between(0, self.num_tokens)

    def _start(self, document: int) -> int:
        return self._file_place(document) - self._first_token

    def _file_place(self, document: int) -> int:
        """The tokens of the file before a document."""
        sequence = int(self._borders[document])
        return self._file_tokens if sequence == len(self._places) else int(self._places[sequence]) // self._token_bytes


def _check_index(prefix: str) -> None:
    """Sequences lie one behind the other and fill PREFIX.bin; the borders of the documents ascend among them."""
    index = Path(f"{prefix}.idx")
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise damaged(prefix, f"{index} is no index of Megatron's")
    version, dtype, num_sequences, num_borders = INDEX_HEADER.unpack(header)
    if version != INDEX_VERSION:
        raise damaged(prefix, f"{index} has version {version}, not {INDEX_VERSION}")
    if dtype not in TOKEN_DTYPES:
        raise damaged(prefix, f"{index} has dtype code {dtype}, which is no integer of Megatron's")
    _check_size(prefix, ".idx", INDEX_HEADER.size + 12 * num_sequences + 8 * num_borders)
    content = np.memmap(index, mode="r")
    lengths = np.frombuffer(content, np.int32, num_sequences, INDEX_HEADER.size)
    places = np.frombuffer(content, np.int64, num_sequences, INDEX_HEADER.size + 4 * num_sequences)
    borders = np.frombuffer(content, np.int64, num_borders, INDEX_HEADER.size + 12 * num_sequences)
    end, one_behind_the_other = 0, True  # in bytes
    for at in range(0, num_sequences, CHECKED_AT_ONCE):  # so that an index of any size takes no memory
        part = lengths[at : at + CHECKED_AT_ONCE]
        if part.min() < 0:
            raise damaged(prefix, f"{index} has a sequence of {part.min()} tokens")
        ends = end + np.cumsum(part, dtype=np.int64) * np.dtype(TOKEN_DTYPES[dtype]).itemsize
        found = places[at : at + CHECKED_AT_ONCE]
        one_behind_the_other &= found[0] == end and np.array_equal(found[1:], ends[:-1])
        end = int(ends[-1])
    if not end:
        raise damaged(prefix, f"{index} has no token")
    _check_size(prefix, ".bin", end)
    if not one_behind_the_other:
        raise damaged(prefix, f"{index} has sequences that do not lie one behind the other")
    if num_borders == 0 or borders[0] < 0 or borders[-1] != num_sequences or not _ascend(borders):
        raise damaged(prefix, f"{index} has documents whose borders do not ascend to {num_sequences}")


def _ascend(borders: NDArray[np.int64]) -> bool:
    parts = (borders[at : at + CHECKED_AT_ONCE + 1] for at in range(0, len(borders), CHECKED_AT_ONCE))
    return all((part[1:] >= part[:-1]).all() for part in parts)


def _check_size(prefix: str, suffix: str, expected_bytes: int) -> None:
    found_bytes = Path(f"{prefix}{suffix}").stat().st_size
    if found_bytes != expected_bytes:
        raise damaged(prefix, f"{prefix}{suffix} has {found_bytes} bytes, its index expects {expected_bytes}")


def damaged(prefix: str, finding: str) -> UserError:
    """The error for files that are not what they should be."""
    return UserError(
        f"data prefix {prefix!r}: {finding}; copy the set again, or make it again with tools/prepare_data.py"
    )
