"""Values of a text's tokens in a temporary file, so that memory does not grow with the text."""

import tempfile
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from longred_megatron.errors import UserError
from longred_megatron.files import reason


class TokenFile:
    """A row for each token, of one shape and dtype; gone when it is closed.

    Raises UserError where the disk does not take it.
    """

    def __enter__(self) -> Self:
        try:
            self._file = tempfile.TemporaryFile(prefix="longred-")
        except OSError as error:
            raise _cannot_be_used(error) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, start: int, rows: Tensor) -> None:
        """Rows [tokens, ...] from token `start` on, in the place of what was there."""
        self._shape, self._dtype, self._device = rows.shape[1:], rows.dtype, rows.device
        self._row_bytes = rows[0].nbytes
        try:
            self._file.seek(start * self._row_bytes)
            self._file.write(_bytes(rows.cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise _cannot_be_used(error) from None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of tokens that were written, [stop - start, ...], on the device they came from."""
        rows = torch.empty(stop - start, *self._shape, dtype=self._dtype)
        try:
            self._file.seek(start * self._row_bytes)
            count = self._file.readinto(_bytes(rows))
        except OSError as error:
            raise _cannot_be_used(error) from None
        assert count == rows.nbytes
        return rows.to(self._device)

    def blocks(self, stop: int, size: int) -> Iterator[Tensor]:
        """The rows before token `stop`, `size` at a time."""
        for start in range(0, stop, size):
            yield self.read(start, min(start + size, stop))


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.view(-1).view(torch.uint8).numpy())


def _cannot_be_used(error: OSError) -> UserError:
    return UserError(
        f"{tempfile.gettempdir()}: cannot keep the texts' hidden states ({reason(error)}); set TMPDIR to a folder with "
        "more room, or measure fewer or shorter texts"
    )
