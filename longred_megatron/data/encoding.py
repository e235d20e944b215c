"""Documents to token ids, by one process or by many."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longred_megatron.data.documents import Document
from longred_megatron.data.tokenizer import Tokenizer, load_tokenizer
from longred_megatron.errors import UserError
from longred_megatron.files import reason

# Documents travel to the workers in chunks: large, so that the journey costs little; small, for even work.
CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 1 << 20
CHUNKS_IN_FLIGHT_PER_WORKER = 4

type Tokens = NDArray[np.int32]
"""A document's token ids and its end of document, [tokens + 1]."""


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, tokenizer_path: Path, workers: int
) -> Generator[tuple[list[Tokens], int], None, None]:
    """For each chunk of documents, in order: their tokens, and the bytes of input that they stand for."""
    chunks = _chunks(documents)
    if workers > 1:
        return _encoded_by_workers(chunks, tokenizer_path, workers)
    return ((_encode(tokenizer, _texts(chunk)), _num_bytes(chunk)) for chunk in chunks)


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


def _encoded_by_workers(
    chunks: Iterator[list[Document]], tokenizer_path: Path, workers: int
) -> Generator[tuple[list[Tokens], int], None, None]:
    # Spawned, not forked: tokenizers keep threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: workers see this end of the pipe closed when this process is killed.
    life_of_parent, life = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_live_with_parent, initargs=(life_of_parent,))
    others = set(multiprocessing.active_children())
    # A window of our own: the executor's `map` would read all documents at once.
    window: deque[tuple[Future[list[Tokens]], int]] = deque()
    try:
        for chunk in chunks:
            window.append((_submitted(pool, tokenizer_path, _texts(chunk)), _num_bytes(chunk)))
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
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # in the middle of a text, or of its imports: who asks for an end shall not wait
        # In the middle of a result, too. The executor waits for the rest of it as long as anybody could write it, which
        # this process could: its own end of that pipe is never used.
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        pool.shutdown(cancel_futures=True)
        life.close()
        life_of_parent.close()


def _submitted(pool: ProcessPoolExecutor, tokenizer_path: Path, texts: list[str]) -> Future[list[Tokens]]:
    # Processes are started here, and keep the mask: Ctrl-C, which reaches all of the terminal's, is the parent's.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode_in_worker, tokenizer_path, texts)
    except OSError as error:
        raise UserError(f"a tokenizing process cannot be started ({reason(error)}); lower --workers") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _live_with_parent(life: Connection) -> None:
    """Ends this process when the parent is gone, whatever runs here."""

    def wait() -> None:
        life.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode_in_worker(tokenizer_path: Path, texts: list[str]) -> list[Tokens]:
    return _encode(_worker_tokenizer(tokenizer_path), texts)


@lru_cache
def _worker_tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)  # once a process
