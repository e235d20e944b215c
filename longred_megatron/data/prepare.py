"""Text files -> an indexed token file of Megatron: PREFIX.bin, PREFIX.idx, and the report PREFIX.json."""

import fcntl
import json
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from longred_megatron.data.documents import find_files, read_documents
from longred_megatron.data.encoding import Tokens, encoded
from longred_megatron.data.indexed import file_mark
from longred_megatron.data.skipped import Kind, Skipped, named
from longred_megatron.data.tokenizer import Tokenizer, file_digests, load_tokenizer
from longred_megatron.data.upsampling import LongShare, Upsampled, repeats, upsampled
from longred_megatron.errors import UserError
from longred_megatron.files import (
    MARKER,
    PARTIAL,
    begin_folder,
    reason,
    remove_unfinished,
    try_output,
    without_new_parents,
)

# The order in which they appear: a set without an index is never read.
OUTPUT_SUFFIXES = (".bin", ".json", ".idx")
MOVING = "moving"  # in the unfinished folder while its files take their places
MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index holds lengths as 32-bit integers
MAX_WORKERS_PER_CORE = 4


@dataclass(frozen=True)
class LengthBucket:
    """Documents of at most `up_to_tokens` tokens (with the end of document), more than the bucket before."""

    up_to_tokens: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class PrepareReport:
    """What PREFIX.json holds."""

    tokenizer: str
    tokenizer_sha256: dict[str, str]  # by file
    vocab_size: int
    end_of_document: int
    dtype: str
    inputs: list[str]
    min_tokens: int
    start_token: int | None  # with which the tokenizer itself opens a text
    starts_documents: bool  # whether each document here begins with it
    upsampling: Upsampled | None
    documents_kept: int
    documents_dropped: int  # shorter than min_tokens
    tokens: int  # in the set, with the start and the end of each document, and repeated ones
    lengths: list[LengthBucket]  # of the documents in the set
    skipped: dict[str, Kind]  # bad documents, by kind
    passed_over: dict[str, Kind]  # files of other kinds and the like
    files: dict[str, Any]  # suffix -> `file_mark`

    def summary(self) -> str:
        """Counts, the histogram of lengths with each bucket's share of the tokens, and what was skipped."""
        lines = [
            f"{self.documents_kept:,} documents kept, {self.documents_dropped:,} dropped "
            f"(fewer than {self.min_tokens:,} tokens); {self.tokens:,} tokens ({self.dtype})",
            f"{'length up to':>14} {'documents':>14} {'tokens':>18} {'share':>7}",
        ]
        lines += [
            f"{each.up_to_tokens:>14,} {each.documents:>14,} {each.tokens:>18,} {each.tokens / self.tokens:>7.1%}"
            for each in self.lengths
        ]
        lines += [self.upsampling.summary()] if self.upsampling else []
        lines += [f"skipped: {each}" for each in named(self.skipped)]
        lines += [f"passed over: {each}" for each in named(self.passed_over)]
        return "\n".join(lines)


def prepare(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    output_prefix: Path,
    *,
    min_tokens: int = 1,
    workers: int = 1,
    text_key: str = "text",
    overwrite: bool = False,
    bos: bool = False,
    long_share: LongShare | None = None,
) -> PrepareReport:
    """Tokenizes the documents of `inputs` (files and folders) into the indexed data set `output_prefix`.

    Every document is followed by the tokenizer's end of document. Documents come in the order of the files,
    whatever the number of `workers` (processes). Memory holds a few chunks of documents a worker, and the
    lengths of all. The set appears when it is whole.

    Args:
        min_tokens: documents with fewer tokens, end of document not counted, are dropped; at least 1.
        text_key: the text's key in .jsonl lines, and its column in .parquet files.
        overwrite: replace an existing set.
        bos: documents begin with the token with which the tokenizer itself opens a text.
        long_share: long documents are repeated, behind all others, until they are so large a share.

    Raises: `UserError` for bad inputs, tokenizer or settings, a set that exists, a disk that is full, if most documents
    are bad, and if none is kept.
    """
    _check_settings(output_prefix, min_tokens, workers, long_share)
    skipped = Skipped()
    files = find_files(inputs, skipped)
    num_bytes = sum(file.stat().st_size for file in files)
    with _unfinished_set(output_prefix, overwrite) as folder:
        tokenizer = load_tokenizer(tokenizer_path)
        documents = chain.from_iterable(read_documents(file, text_key, skipped) for file in files)
        start = _start_tokens(tokenizer, tokenizer_path) if bos else ()
        chunks = encoded(documents, tokenizer, tokenizer_path, workers, start)
        least = len(start) + min_tokens + 1
        written = _write_indexed(chunks, folder, tokenizer.vocab_size, least, num_bytes, long_share)
        skipped.check()
        written.check(min_tokens)
        report = PrepareReport(
            tokenizer=str(tokenizer_path.resolve()),
            tokenizer_sha256=file_digests(tokenizer_path),
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            start_token=tokenizer.start_token,
            starts_documents=bos,
            inputs=[str(path) for path in inputs],
            min_tokens=min_tokens,
            **written.facts(),
            skipped=skipped.bad,
            passed_over=skipped.others,
            files={suffix: file_mark(folder / f"set{suffix}") for suffix in (".bin", ".idx")},
        )
        (folder / "set.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        _move(folder, output_prefix)
    return report


def _check_settings(output_prefix: Path, min_tokens: int, workers: int, long_share: LongShare | None) -> None:
    most_workers = max(16, MAX_WORKERS_PER_CORE * (os.cpu_count() or 1))
    problems = [
        f"{name} is {value}; give at least 1 and at most {most}"
        for name, value, most in (
            ("--min-tokens", min_tokens, MAX_DOCUMENT_TOKENS),
            ("--workers", workers, most_workers),
        )
        if not 1 <= value <= most
    ]
    problems += long_share.problems() if long_share else []
    if output_prefix.name in ("", ".."):
        problems.append(f"--output {output_prefix}: names no set; give a folder and a name, such as data/books")
    if problems:
        raise UserError(*problems)
    try_output(Path(f"{output_prefix}{OUTPUT_SUFFIXES[-1]}"), "--output")


@contextmanager
def _unfinished_set(output_prefix: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output to write `set.bin` and the others into; it goes when the block ends, however it does.

    What a killed run with this output left is removed. The folder is locked: of two runs at once, one is refused.

    Raises: `UserError` if a set is there and not to be replaced, and for any OSError: of a full disk, say.
    """
    path = output_prefix.with_name(f".{output_prefix.name}")
    partial = path.with_name(path.name + PARTIAL)
    try:
        with without_new_parents(path), _locked(partial):
            _clear_halves(partial, output_prefix)
            _check_existing(output_prefix, overwrite)
            try:
                begin_folder(path)
                with _locked(partial):
                    yield partial
            finally:
                _clear_halves(partial, output_prefix)
                remove_unfinished(partial)
    except OSError as error:
        raise UserError(
            f"--output {output_prefix}: cannot be written ({reason(error)}); make room, or choose another"
        ) from error


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Holds the marker of an unfinished folder, if there is one; the system lets go of it when this process ends."""
    try:
        marker = (partial / MARKER).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another prepare_data is writing this set; wait for it or end it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _clear_halves(partial: Path, output_prefix: Path) -> None:
    """Removes what a run that ended between its first and its last move has put in place; its index was not."""
    if (partial / MARKER).is_file() and (partial / MOVING).is_file() and (partial / "set.idx").is_file():
        for suffix in OUTPUT_SUFFIXES:
            if not (partial / f"set{suffix}").exists():
                Path(f"{output_prefix}{suffix}").unlink(missing_ok=True)


def _check_existing(output_prefix: Path, overwrite: bool) -> None:
    paths = [Path(f"{output_prefix}{suffix}") for suffix in OUTPUT_SUFFIXES]
    existing = [path for path in paths if os.path.lexists(path)]
    foreign = [path for path in existing if not (path.is_file() or path.is_symlink())]
    if foreign:
        raise UserError(f"{', '.join(map(str, foreign))}: in the way, and no file; choose another --output")
    if existing and not overwrite:
        raise UserError(
            f"{', '.join(map(str, existing))}: already there; choose another --output, or replace with --overwrite"
        )


def _move(folder: Path, output_prefix: Path) -> None:
    """The set takes its place: what is there goes index first, and the new index comes last."""
    (folder / MOVING).touch()
    Path(f"{output_prefix}.idx").unlink(missing_ok=True)
    for suffix in OUTPUT_SUFFIXES:
        (folder / f"set{suffix}").replace(f"{output_prefix}{suffix}")


def _start_tokens(tokenizer: Tokenizer, path: Path) -> tuple[int, ...]:
    if tokenizer.start_token is None:
        raise UserError(
            f"--bos: the tokenizer {path} puts no start token before a text, or does not say so (as a sentencepiece "
            ".model file); leave it out, or give the model's Hugging Face folder"
        )
    return (tokenizer.start_token,)


@dataclass(frozen=True)
class _Written:
    """lengths: of the documents in the set; kept: how many they are without repeats; dropped: those too short."""

    lengths: NDArray[np.int64]
    kept: int
    dropped: int
    dtype: str
    upsampling: Upsampled | None

    def check(self, min_tokens: int) -> None:
        """Raises `UserError` when the set is empty."""
        if self.kept == 0:
            raise UserError(
                f"no document kept: {self.dropped} read, each with fewer than {min_tokens} tokens; "
                "lower --min-tokens or give longer texts"
            )

    def facts(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "dtype": self.dtype,
            "upsampling": self.upsampling,
            "documents_kept": self.kept,
            "documents_dropped": self.dropped,
            "tokens": int(self.lengths.sum()),
            "lengths": _histogram(self.lengths),
        }


def _write_indexed(
    chunks: Generator[tuple[list[Tokens], int], None, None],
    folder: Path,
    vocab_size: int,
    least_tokens: int,
    num_bytes: int,
    long_share: LongShare | None,
) -> _Written:
    """Writes set.bin and set.idx; shows how far it is in the `num_bytes` of the input."""
    # Megatron takes seconds to import: at the top of this file every tokenizing process would spend them too.
    with warnings.catch_warnings(action="ignore"):  # about kernels that are not needed here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "set.bin"), dtype=dtype)
    dropped, account = 0, None
    with (
        closing(builder.data_file),  # `finalize` closes it too, but a failure never gets there
        closing(chunks),  # its processes end with it
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress,
    ):
        for documents, num_new_bytes in chunks:
            for tokens in documents:
                if len(tokens) < least_tokens:
                    dropped += 1
                else:
                    builder.add_document(tokens, [len(tokens)])
            progress.update(num_new_bytes)
        kept = len(builder.sequence_lengths)
        if long_share is not None and kept:
            account = _repeat_long(builder, folder / "set.bin", np.dtype(dtype), long_share)
        builder.finalize(str(folder / "set.idx"))
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    return _Written(lengths, kept, dropped, np.dtype(dtype).name, account)


def _repeat_long(builder: Any, file: Path, dtype: "np.dtype[Any]", wanted: LongShare) -> Upsampled:
    """Appends the long documents that `wanted` needs, round by round, each read back from the file."""
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    counts = repeats(lengths, wanted)
    builder.data_file.flush()
    tokens = np.memmap(file, dtype=dtype, mode="r")
    ends = np.cumsum(lengths)
    for number in range(int(counts.max(initial=0))):
        for document in tqdm(np.flatnonzero(counts > number), desc="repeating", unit=" documents", disable=None):
            end, length = int(ends[document]), int(lengths[document])
            builder.add_document(np.array(tokens[end - length : end]), [length])
    return upsampled(lengths, counts, wanted)


def _histogram(lengths: NDArray[np.int64]) -> list[LengthBucket]:
    bounds = 2 ** np.ceil(np.log2(lengths)).astype(np.int64)
    return [
        LengthBucket(int(bound), int((bounds == bound).sum()), int(lengths[bounds == bound].sum()))
        for bound in np.unique(bounds)
    ]
