"""The two files of an indexed data set, PREFIX.bin and PREFIX.idx, checked before Megatron maps them."""

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
        _check_header(prefix)  # before Megatron does, whose assertions would not say what to do
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # slow to import, and only data need it

        dataset = IndexedDataset(prefix)
    except (OSError, ValueError) as error:
        raise damaged(prefix, f"its files cannot be read ({reason(error)})") from None
    _check_places(prefix, dataset)
    return dataset


def num_tokens_in(dataset: "IndexedDataset") -> int:
    """Of all sequences."""
    return int(dataset.sequence_lengths.sum(dtype=np.int64))


def _check_header(prefix: str) -> None:
    with Path(f"{prefix}.idx").open("rb") as index:
        header = index.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise damaged(prefix, f"{prefix}.idx is no index of Megatron's")
    version, dtype, num_sequences, num_borders = INDEX_HEADER.unpack(header)
    if version != INDEX_VERSION:
        raise damaged(prefix, f"{prefix}.idx has version {version}, not {INDEX_VERSION}")
    if dtype not in TOKEN_DTYPES:
        raise damaged(prefix, f"{prefix}.idx has dtype code {dtype}, which is no integer of Megatron's")
    _check_size(prefix, ".idx", INDEX_HEADER.size + 12 * num_sequences + 8 * num_borders)
    if Path(f"{prefix}.bin").stat().st_size == 0:
        raise damaged(prefix, f"{prefix}.bin is empty")


def _check_places(prefix: str, dataset: "IndexedDataset") -> None:
    """Sequences lie one behind the other and fill PREFIX.bin; the borders of the documents ascend among them."""
    lengths, borders = dataset.sequence_lengths, dataset.document_indices
    if len(lengths) and lengths.min() < 0:
        raise damaged(prefix, f"{prefix}.idx has a sequence of {lengths.min()} tokens")
    token_bytes = np.dtype(dataset.index.dtype).itemsize
    _check_size(prefix, ".bin", num_tokens_in(dataset) * token_bytes)
    pointers = dataset.index.sequence_pointers
    if len(pointers) and (
        pointers[0] or (np.diff(pointers) != np.multiply(lengths[:-1], token_bytes, dtype=np.int64)).any()
    ):
        raise damaged(prefix, f"{prefix}.idx has sequences that do not lie one behind the other")
    if len(borders) == 0 or borders[0] < 0 or borders[-1] > len(lengths) or (np.diff(borders) < 0).any():
        raise damaged(prefix, f"{prefix}.idx has documents whose borders do not ascend from 0 to {len(lengths)}")


def _check_size(prefix: str, suffix: str, expected_bytes: int) -> None:
    found_bytes = Path(f"{prefix}{suffix}").stat().st_size
    if found_bytes != expected_bytes:
        raise damaged(prefix, f"{prefix}{suffix} has {found_bytes} bytes, its index expects {expected_bytes}")


def damaged(prefix: str, finding: str) -> UserError:
    """The error for files that are not what they should be."""
    return UserError(
        f"data prefix {prefix!r}: {finding}; copy the set again, or make it again with tools/prepare_data.py"
    )
