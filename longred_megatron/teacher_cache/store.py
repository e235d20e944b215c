"""The files of a teacher cache: one for each value of each sequence, found by its key.

A file is safetensors with the rows of a whole sequence, so that ranks of any layout read their own. Its header has the
key, which says whose values they are, and a checksum of every `BLOCK` rows, which says that they are whole.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longred_megatron.files import appearing_whole, save_tensors

NumberFormat = Literal["exact", "fp8"]
BLOCK = 256  # rows with a checksum: a rank reads its own and up to a block more on each side
FP8 = torch.float8_e4m3fn
SMALLEST = 1e-30  # largest number of a token that is divided by


class TargetStore:
    """A folder of values. Any number of processes may read and write it at once.

    number_format: of floating-point values; fp8: E4M3 with an fp32 scale for each token (and head).
    """

    def __init__(self, folder: Path, number_format: NumberFormat) -> None:
        self.folder, self.number_format = folder, number_format

    def path(self, key: str) -> Path:
        """Where the value with this key is, or will be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, key: str, value: Tensor) -> None:
        """Keeps a value [sequence_length, ...], which is in the machine's memory, unless it is there and whole.

        Raises OSError, for instance of a full disk.
        """
        if self.path(key).exists() and self.read(key, 0, len(value)) is not None:
            return
        tensors = self.packed(value)
        checksums = {name: [_checksum(rows) for rows in tensor.split(BLOCK)] for name, tensor in tensors.items()}
        with appearing_whole(self.path(key)) as partial:
            save_tensors(tensors, partial, {"key": key, "checksums": json.dumps(checksums)})

    def read(self, key: str, start: int, stop: int) -> Tensor | None:
        """Rows `start` to `stop` of a value; None where there is none, or it is damaged or another's."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                checksums = json.loads(header["checksums"])
                if header["key"] != key:
                    return None
                parts = {name: _rows(file, name, checksums[name], start, stop) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None
        return None if None in parts.values() else self._unpacked(parts)

    def packed(self, value: Tensor) -> dict[str, Tensor]:
        """The tensors of a file."""
        value = value.contiguous()
        if self.number_format == "exact" or not value.is_floating_point():
            return {"values": value}
        numbers = value.float()
        scale = numbers.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / torch.finfo(FP8).max
        # The empty rows say which number format the values had.
        return {"values": (numbers / scale).to(FP8), "scale": scale, "empty": value[:0]}

    def _unpacked(self, tensors: Mapping[str, Any]) -> Tensor:
        value: Tensor = tensors["values"]
        if "scale" not in tensors:
            return value
        return (value.float() * tensors["scale"]).to(tensors["empty"].dtype)

    def rounded(self, value: Tensor) -> Tensor:
        """A value as it will be read again."""
        return self._unpacked(self.packed(value)) if self.number_format != "exact" else value


def _rows(file: Any, name: str, checksums: list[int], start: int, stop: int) -> Tensor | None:
    """None where a checksum says that they are not what was written."""
    inner = file.get_slice(name)
    length = inner.get_shape()[0]
    if length == 0:
        return file.get_tensor(name)
    first = start // BLOCK
    blocks: Tensor = inner[first * BLOCK : min(length, -(-stop // BLOCK) * BLOCK)]
    if any(_checksum(rows) != checksums[i] for i, rows in enumerate(blocks.split(BLOCK), start=first)):
        return None
    return blocks[start - first * BLOCK : stop - first * BLOCK]


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy())
