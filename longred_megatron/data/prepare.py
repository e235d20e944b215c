"""Text files -> an indexed token file of Megatron: PREFIX.bin, PREFIX.idx, and the report PREFIX.json."""

import json
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from longred_megatron.data.documents import Document, find_files, read_documents
from longred_megatron.data.tokenizer import Tokenizer, file_digests, load_tokenizer
from longred_megatron.errors import UserError
from longred_megatron.files import appearing_whole, write_text

# Documents travel to the workers in chunks: large, so that the journey costs little; small, for even work.
CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 1 << 20
CHUNKS_IN_FLIGHT_PER_WORKER = 4
OUTPUT_SUFFIXES = (".bin", ".json", ".idx")

type Tokens = NDArray[np.int32]
"""A document's token ids and its end of document, [tokens + 1]."""


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
    documents_kept: int
    documents_dropped: int  # shorter than min_tokens
    tokens: int  # kept, with the end of each document
    lengths: list[LengthBucket]

    def summary(self) -> str:
        """Counts, and the histogram of lengths with each bucket's share of the tokens."""
        lines = [
            f"{self.documents_kept:,} documents kept, {self.documents_dropped:,} dropped "
            f"(fewer than {self.min_tokens:,} tokens); {self.tokens:,} tokens ({self.dtype})",
            f"{'length up to':>14} {'documents':>14} {'tokens':>18} {'share':>7}",
        ]
        lines += [
            f"{each.up_to_tokens:>14,} {each.documents:>14,} {each.tokens:>18,} {each.tokens / self.tokens:>7.1%}"
            for each in self.lengths
        ]
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
) -> PrepareReport:
    """Tokenizes the documents of `inputs` (files and folders) into the indexed data set `output_prefix`.

    Every document is followed by the tokenizer's end of document. Documents come in the order of the files,
    whatever the number of `workers` (processes). Memory holds a few chunks of documents a worker, and the
    lengths of all. The set appears when it is whole.

    Args:
        min_tokens: documents with fewer tokens, end of document not counted, are dropped; at least 1.
        text_key: the text's key in .jsonl lines, and its column in .parquet files.
        overwrite: replace an existing set.

    Raises: `UserError` for bad inputs, tokenizer or settings, a set that exists, and if no document is kept.
    """
    _check_settings(output_prefix, min_tokens, workers, overwrite)
    files = find_files(inputs)
    tokenizer = load_tokenizer(tokenizer_path)
    chunks = _chunks(chain.from_iterable(read_documents(file, text_key) for file in files))
    encoded = _encoded(chunks, tokenizer, tokenizer_path, workers)
    num_bytes = sum(file.stat().st_size for file in files)
    data, report_file, index = (Path(f"{output_prefix}{suffix}") for suffix in OUTPUT_SUFFIXES)
    with (
        # The index goes first and comes last: a set without one is never read, however this is interrupted.
        appearing_whole(index) as partial_index,
        appearing_whole(data) as partial_data,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress,
    ):
        lengths, dropped, dtype = _write_indexed(
            encoded, partial_data, partial_index, tokenizer.vocab_size, min_tokens, progress
        )
        if len(lengths) == 0:
            raise UserError(
                f"no document kept: {dropped} read, each with fewer than {min_tokens} tokens; "
                "lower --min-tokens or give longer texts"
            )
        report = PrepareReport(
            tokenizer=str(tokenizer_path.resolve()),
            tokenizer_sha256=file_digests(tokenizer_path),
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype=dtype,
            inputs=[str(path) for path in inputs],
            min_tokens=min_tokens,
            documents_kept=len(lengths),
            documents_dropped=dropped,
            tokens=int(lengths.sum()),
            lengths=_histogram(lengths),
        )
        index.unlink(missing_ok=True)
        write_text(report_file, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _check_settings(output_prefix: Path, min_tokens: int, workers: int, overwrite: bool) -> None:
    problems = [
        f"{name} is {value}; give at least 1"
        for name, value in (("--min-tokens", min_tokens), ("--workers", workers))
        if value < 1
    ]
    existing = [f"{output_prefix}{suffix}" for suffix in OUTPUT_SUFFIXES if Path(f"{output_prefix}{suffix}").exists()]
    if existing and not overwrite:
        problems.append(
            f"{', '.join(existing)}: already there; choose another --output, or replace them with --overwrite"
        )
    if problems:
        raise UserError(*problems)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    num_characters = 0
    for document in documents:
        chunk.append(document)
        num_characters += len(document.text)
        if len(chunk) == CHUNK_DOCUMENTS or num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _texts(chunk: list[Document]) -> list[str]:
    return [document.text for document in chunk]


def _num_bytes(chunk: list[Document]) -> int:
    return sum(document.num_bytes for document in chunk)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    return [np.array([*tokenizer.encode(text), tokenizer.end_of_document], dtype=np.int32) for text in texts]


def _encoded(
    chunks: Iterator[list[Document]], tokenizer: Tokenizer, tokenizer_path: Path, workers: int
) -> Iterator[tuple[list[Tokens], int]]:
    """For each chunk, in order: the tokens of its documents, and the bytes of input it stands for."""
    if workers > 1:
        return _encoded_by_workers(chunks, tokenizer_path, workers)
    return ((_encode(tokenizer, _texts(chunk)), _num_bytes(chunk)) for chunk in chunks)


def _encoded_by_workers(
    chunks: Iterator[list[Document]], tokenizer_path: Path, workers: int
) -> Iterator[tuple[list[Tokens], int]]:
    """The same, by so many processes."""
    # Spawned, not forked: tokenizers keep threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_parent)
    # A window of our own: the executor's `map` would read all documents at once.
    window: deque[tuple[Future[list[Tokens]], int]] = deque()
    try:
        for chunk in chunks:
            window.append((pool.submit(_encode_in_worker, tokenizer_path, _texts(chunk)), _num_bytes(chunk)))
            if len(window) == workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                future, num_bytes = window.popleft()
                yield future.result(), num_bytes
        for future, num_bytes in window:
            yield future.result(), num_bytes
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenizing processes was ended, most likely for want of memory; lower --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_in_worker(tokenizer_path: Path, texts: list[str]) -> list[Tokens]:
    return _encode(_worker_tokenizer(tokenizer_path), texts)


@lru_cache
def _worker_tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)  # once a process


def _write_indexed(
    encoded: Iterable[tuple[list[Tokens], int]],
    data: Path,
    index: Path,
    vocab_size: int,
    min_tokens: int,
    progress: tqdm,
) -> tuple[NDArray[np.int64], int, str]:
    """Writes the tokens and their index. Returns the lengths of the documents kept, how many not, and the dtype."""
    # Megatron takes seconds to import: at the top of this file every tokenizing process would spend them too.
    with warnings.catch_warnings(action="ignore"):  # about kernels that are not needed here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(data), dtype=dtype)
    dropped = 0
    with closing(builder.data_file):  # `finalize` closes it too, but a failure never gets there
        for documents, num_bytes in encoded:
            for tokens in documents:
                if len(tokens) - 1 < min_tokens:
                    dropped += 1
                else:
                    builder.add_document(tokens, [len(tokens)])
            progress.update(num_bytes)
        builder.finalize(str(index))
    return np.array(builder.sequence_lengths, dtype=np.int64), dropped, np.dtype(dtype).name


def _histogram(lengths: NDArray[np.int64]) -> list[LengthBucket]:
    bounds = 2 ** np.ceil(np.log2(lengths)).astype(np.int64)
    return [
        LengthBucket(int(bound), int((bounds == bound).sum()), int(lengths[bounds == bound].sum()))
        for bound in np.unique(bounds)
    ]
