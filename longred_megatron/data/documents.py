"""Documents out of text files: .txt (one a file), .jsonl (one a line), .parquet (one a row)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longred_megatron.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class Document:
    """A text, and how many bytes of its file it stands for (an even share of a parquet file)."""

    text: str
    num_bytes: int


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The text files named by `inputs`, in their order; a folder stands for all below it, sorted by path.

    Raises: `UserError` for paths that do not exist, files of another kind, files given twice, and folders
    without a file.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                problems.append(f"input {path}: no {', '.join(SUFFIXES)} file found in it; give a folder that has one")
            files += found
        elif not path.exists():
            problems.append(f"input {path} does not exist")
        elif path.suffix not in SUFFIXES:
            problems.append(f"input {path}: its suffix is none of {', '.join(SUFFIXES)}; convert or rename it")
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


def read_documents(file: Path, text_key: str) -> Iterator[Document]:
    """The documents of a file; `text_key` is the text's key in a .jsonl line, its column in a .parquet file.

    A file of any other kind is one document. Lines of nothing but white space are skipped. Memory holds one
    document, or one row group's texts.

    Raises: `UserError` that names the file and the line or row.
    """
    readers = {".jsonl": _read_lines, ".parquet": _read_rows}
    return readers.get(file.suffix, _read_text)(file, text_key)


def _read_text(file: Path, _text_key: str) -> Iterator[Document]:
    content = file.read_bytes()
    try:
        yield Document(content.decode("utf-8-sig"), len(content))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from error


def _read_lines(file: Path, text_key: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(_text_of_line(line, f"{file}:{number}", text_key), len(line))


def _text_of_line(line: bytes, where: str, text_key: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise UserError(f"{where}: not a line of JSON ({error}); fix or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}; each line must be an object such as {{"{text_key}": "..."}}')
    if text_key not in row:
        raise UserError(f"{where}: no key {text_key!r} among {sorted(row)}; name the text's key with --text-key")
    return _checked_text(row[text_key], where, text_key)


def _checked_text(text: object, where: str, text_key: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} is {type(text).__name__}, not a text; fix or remove it")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: {text_key!r} holds half a surrogate pair, which is no character; fix or remove it")
    return text


def _read_rows(file: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet  # here, because only these files need it

    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a parquet file ({error}); write it again") from error
    columns = table.schema_arrow.names
    if text_key not in columns:
        raise UserError(f"{file}: no column {text_key!r} among {columns}; name the text's column with --text-key")
    bytes_per_row = file.stat().st_size // max(1, table.metadata.num_rows)
    number = 0
    for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield Document(_checked_text(text, f"{file}: row {number}", text_key), bytes_per_row)
