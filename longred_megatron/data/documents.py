"""Documents out of text files: .txt (one a file), .jsonl (one a line), .parquet (one a row); .txt and .jsonl also
compressed, as .gz or .zst."""

import io
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longred_megatron.data.skipped import Bad, Skipped
from longred_megatron.errors import UserError
from longred_megatron.files import reason

SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of .txt and .jsonl; parquet files are compressed inside
KINDS = f"{', '.join(SUFFIXES)} (.txt and .jsonl also with {' or '.join(COMPRESSIONS)} behind)"
PARQUET_BATCH_ROWS = 256
# Tokenizers need about 60 bytes of memory a character, and no model's window is nearly as long.
MAX_DOCUMENT_BYTES = 64 << 20
TOO_LONG = f"a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB"
# Text shrinks to a tenth, rarely to a fiftieth; a file made to fill memory and disk, to a thousandth and less.
MAX_UNPACKED_PER_BYTE = 200
UNPACKED_ALWAYS_BYTES = 16 << 20
_CONTROL = re.compile(r"[\x01-\x06\x0e-\x1a\x7f]")  # control characters that no text editor writes
_CONTROL_SAMPLE_CHARACTERS = 4096


@dataclass(frozen=True)
class Document:
    """A text, and how many bytes of its file it stands for (an even share of a parquet file)."""

    text: str
    num_bytes: int


def find_files(inputs: Sequence[Path], skipped: Skipped | None = None) -> list[Path]:
    """The text files named by `inputs`, in their order; a folder stands for all below it, sorted by path.

    What in a folder cannot be used goes to `skipped`; without one, what is broken is an error, and files of other
    kinds are passed over. Links to files are followed, links to folders are not.

    Raises: `UserError` for paths that do not exist or cannot be read, files of another kind, files given twice, and
    folders without a file.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in inputs:
        try:
            found = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL
            problems.append(_unusable_input(path, error))
            continue
        if found:
            inside = sorted(_files_below(path, skipped))
            if not inside and not (skipped and skipped.bad):
                problems.append(f"input {path}: no {', '.join(SUFFIXES)} file found in it; give a folder that has one")
            files += inside
        elif not _kind(path):
            problems.append(f"input {path}: its suffix is none of {KINDS}; convert or rename it")
        elif what := _not_regular(path):
            problems.append(f"input {path}: not a regular file, but {what}; give a file or a folder")
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            problems.append(f"input {file} is given twice (by itself, a link or its folder); name it once")
        seen.add(file.resolve())
    if problems:
        raise UserError(*problems)
    return files


def _unusable_input(path: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"input {str(path)!r}: cannot be read ({reason(error)}); give a file or a folder of texts"
    if _dangling(path):
        return f"input {path}: a link to {path.readlink()}, which does not exist; give the file itself"
    return f"input {path} does not exist"


def _files_below(folder: Path, skipped: Skipped | None) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        _report(Bad("folder that cannot be read", str(error.filename), reason(error)), skipped)

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for path in (Path(parent, name) for name in folders):
            if skipped and path.is_symlink():
                skipped.pass_over("link to a folder, which is not followed", str(path))
        for path in (Path(parent, name) for name in sorted(names)):
            if not _kind(path):
                if skipped:
                    skipped.pass_over("file of another kind", str(path))
            elif what := _not_regular(path):
                _report(Bad("broken link, or not a regular file", str(path), what), skipped)
            else:
                yield path


def _not_regular(path: Path) -> str:
    """What it is instead of a regular file, or why nobody can tell; "" for one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a link to {path.readlink()}, which does not exist" if _dangling(path) else reason(error)
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something else")


def _dangling(path: Path) -> bool:
    return path.is_symlink() and not os.path.lexists(path.parent / path.readlink())


def _kind(path: Path) -> str:
    """The suffix of a text file without that of its compression; "" for files of other kinds."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix != ".parquet" and suffix in SUFFIXES else ""
    return suffix if suffix in SUFFIXES else ""


def _report(bad: Bad, skipped: Skipped | None) -> None:
    if skipped is None:
        raise UserError(str(bad))
    skipped.add(bad)


def read_documents(file: Path, text_key: str, skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of a file; `text_key` is the text's key in a .jsonl line, its column in a .parquet file.

    A file of any other kind is one document. Lines of nothing but white space are skipped. Bad documents go to
    `skipped`; without one, the first is an error. Memory holds one document, or one batch of rows.

    Raises: `UserError` that names the file and the line or row.
    """
    readers = {".jsonl": _read_lines, ".parquet": _read_rows}
    for found in readers.get(_kind(file), _read_text)(file, text_key):
        if isinstance(found, Bad):
            _report(found, skipped)
        else:
            if skipped:
                skipped.num_good += 1
            yield found


class _Stream:
    """A text file's bytes, unpacked if it is compressed; counts both."""

    def __init__(self, file: Path) -> None:
        self._raw = file.open("rb", buffering=0)
        unpacked: Any = self._raw
        if compression := COMPRESSIONS.get(file.suffix.lower()):
            import pyarrow  # here, because only these files need it

            unpacked = pyarrow.CompressedInputStream(self._raw, compression)
        self._bytes = io.BufferedReader(unpacked, 1 << 16)
        self._num_unpacked = self._num_told = 0
        self._num_allowed = UNPACKED_ALWAYS_BYTES

    def read(self) -> bytes:
        """All there is. Raises OSError."""
        content = self._counted(self._bytes.read(MAX_DOCUMENT_BYTES + 1))
        if len(content) > MAX_DOCUMENT_BYTES:
            raise OSError(f"{TOO_LONG}; split it")
        return content

    def read_line(self) -> bytes | None:
        """The next line; b"" at the end, and None in place of one that is too long. Raises OSError."""
        content = part = self._counted(self._bytes.readline(MAX_DOCUMENT_BYTES + 1))
        while len(part) > MAX_DOCUMENT_BYTES and not part.endswith(b"\n"):
            part = self._counted(self._bytes.readline(MAX_DOCUMENT_BYTES + 1))
        return content if len(content) <= MAX_DOCUMENT_BYTES else None

    def _counted(self, content: bytes) -> bytes:
        self._num_unpacked += len(content)
        if self._num_unpacked > self._num_allowed:
            self._num_allowed = MAX_UNPACKED_PER_BYTE * self._raw.tell()
            if self._num_unpacked > self._num_allowed:
                raise OSError(f"unpacks to more than {MAX_UNPACKED_PER_BYTE} times its size")
        return content

    def num_new_bytes(self) -> int:
        """Bytes of the file that were read since the last call."""
        before, self._num_told = self._num_told, self._raw.tell()
        return self._num_told - before

    def close(self) -> None:
        self._bytes.close()
        self._raw.close()


def _read_text(file: Path, _text_key: str) -> Iterator[Document | Bad]:
    try:
        with closing(_Stream(file)) as stream:
            content, num_bytes = stream.read(), stream.num_new_bytes()
    except OSError as error:
        yield Bad("file that cannot be read", str(file), reason(error))
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Bad("not UTF-8", str(file), f"{error.reason} at byte {error.start}", "convert it to UTF-8")
        return
    bad = _problem(text, str(file))
    yield bad if bad else Document(text, num_bytes)


def _read_lines(file: Path, text_key: str) -> Iterator[Document | Bad]:
    number = 0
    try:
        with closing(_Stream(file)) as stream:
            while (line := stream.read_line()) != b"":
                number += 1
                if line is None:
                    yield Bad(TOO_LONG, f"{file}:{number}", advice="split it")
                elif line.strip():
                    yield _document_of_line(line, f"{file}:{number}", text_key, stream.num_new_bytes())
    except OSError as error:
        where = f"{file}, all behind line {number}" if number else str(file)
        yield Bad("file that cannot be read", where, reason(error))


def _document_of_line(line: bytes, where: str, text_key: str, num_bytes: int) -> Document | Bad:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes it would guess UTF-16 too
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", where, f"{error.reason} at byte {error.start}", "convert it to UTF-8")
    except (ValueError, RecursionError) as error:
        return Bad("not a line of JSON", where, str(error))
    if not isinstance(row, dict):
        return Bad("line that is no object", where, type(row).__name__, f'write it as {{"{text_key}": "..."}}')
    if text_key not in row:
        keys = ", ".join(map(repr, sorted(row)))[:200]
        return Bad(f"no key {text_key!r}", where, f"its keys: {keys}", "name the text's key with --text-key")
    bad = _problem(row[text_key], where)
    return bad if bad else Document(row[text_key], num_bytes)


def _problem(text: object, where: str) -> Bad | None:
    if not isinstance(text, str):
        return Bad("value that is no text", where, "null" if text is None else type(text).__name__)
    if "\0" in text or len(_CONTROL.findall(text, 0, _CONTROL_SAMPLE_CHARACTERS)) * 10 > min(
        len(text), _CONTROL_SAMPLE_CHARACTERS
    ):
        return Bad("binary, not text", where, "NUL or many control characters")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return Bad("half a surrogate pair, which is no character", where)
    if len(text) > MAX_DOCUMENT_BYTES:
        return Bad(TOO_LONG, where, advice="split it")
    return None


def _read_rows(file: Path, text_key: str) -> Iterator[Document | Bad]:
    import pyarrow
    from pyarrow import parquet  # here, because only these files need it

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                found = f"its columns: {', '.join(map(repr, columns))[:200]}"
                yield Bad(f"no column {text_key!r}", str(file), found, "name the text's column with --text-key")
                return
            bytes_per_row = file.stat().st_size // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    number += 1
                    yield _document_of_row(value, f"{file}: row {number}", bytes_per_row)
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{file}, all behind row {number}" if number else str(file)
        yield Bad("not a parquet file, or a damaged one", where, reason(error), "write it again")


def _document_of_row(value: Any, where: str, num_bytes: int) -> Document | Bad:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", where, f"{error.reason} at byte {error.start}", "convert it to UTF-8")
    bad = _problem(text, where)
    return bad if bad else Document(text, num_bytes)
