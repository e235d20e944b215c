"""Documents to token ids, by one process or by many."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
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
"""A document's token ids and its end of document, [tokens + 1]; with a start token before them, [tokens + 2]."""


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, tokenizer_path: Path, workers: int, start: tuple[int, ...] = ()
) -> Generator[tuple[list[Tokens], int], None, None]:
    """For each chunk of documents, in order: their tokens, and the bytes of input that they stand for.

    start: what each document begins with.
    """
    chunks = _chunks(documents)
    if workers > 1:
        return _encoded_by_workers(chunks, tokenizer_path, workers, start)
    return ((_encode(tokenizer, _texts(chunk), start), _num_bytes(chunk)) for chunk in chunks)


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


def _encode(tokenizer: Tokenizer, texts: list[str], start: tuple[int, ...]) -> list[Tokens]:
    return [np.array([*start, *tokenizer.encode(text), tokenizer.end_of_document], dtype=np.int32) for text in texts]


def _encoded_by_workers(
    chunks: Iterator[list[Document]], tokenizer_path: Path, workers: int, start: tuple[int, ...]
) -> Generator[tuple[list[Tokens], int], None, None]:
    processes = _Processes(tokenizer_path, workers, start)
    pool = ThreadPoolExecutor(workers)  # a thread for each process, to wait for it
    # A window of our own: the executor's `map` would read all documents at once.
    window: deque[tuple[Future[list[Tokens]], int]] = deque()
    try:
        for chunk in chunks:
            window.append((pool.submit(processes.encode, _texts(chunk)), _num_bytes(chunk)))
            if len(window) == workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                future, num_bytes = window.popleft()
                yield future.result(), num_bytes
        for future, num_bytes in window:
            yield future.result(), num_bytes
    finally:
        processes.kill()  # in the middle of a text, or of its imports: who asks for an end shall not wait
        pool.shutdown(cancel_futures=True)


class _Processes:
    """Encode texts, one process for each thread that asks.

    Each has a pipe of its own. With one for all, as executors have, a process that is killed in the middle of a result
    leaves half of it in the others' way.
    """

    def __init__(self, tokenizer_path: Path, number: int, start: tuple[int, ...]) -> None:
        # Spawned, not forked: tokenizers keep threads, which a fork would break.
        self._context = multiprocessing.get_context("spawn")
        self._tokenizer_path, self._number, self._start_tokens = tokenizer_path, number, start
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._all: list[SpawnProcess] | None = []  # None: no more are started

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Raises UserError where the process cannot be started, was killed, or found a mistake."""
        if not hasattr(self._of_thread, "pipe"):
            self._of_thread.pipe = self._start()
        try:
            self._of_thread.pipe.send(texts)
            result: list[Tokens] | Exception = self._of_thread.pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"one of {self._number} tokenizing processes was ended, most likely for want of memory; lower --workers"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self) -> None:
        with self._lock:
            started, self._all = self._all or [], None
        for process in started:
            process.kill()
        for process in started:
            process.join()

    def _start(self) -> Connection:
        own, its = self._context.Pipe()
        with self._lock:
            if self._all is None:
                raise CancelledError
            process = self._context.Process(
                target=_serve, args=(its, self._tokenizer_path, self._start_tokens), daemon=True
            )
            # A process keeps the mask that it was started with: Ctrl-C, which reaches all of the terminal's, is for
            # this one.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            except OSError as error:
                raise UserError(f"a tokenizing process cannot be started ({reason(error)}); lower --workers") from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._all.append(process)
        its.close()  # when the process is gone, nobody can write: the end of the pipe is seen here
        return own


def _serve(pipe: Connection, tokenizer_path: Path, start: tuple[int, ...]) -> None:
    """Answers lists of texts with their tokens, or with the exception that came of it, as long as the parent lives."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer: Tokenizer | None = None
    with suppress(EOFError, ConnectionError):  # the parent's end is closed: nobody asks, or waits for the answer
        while True:
            texts = pipe.recv()
            result: list[Tokens] | Exception
            try:
                tokenizer = tokenizer or load_tokenizer(tokenizer_path)
                result = _encode(tokenizer, texts, start)
            except Exception as error:
                result = error
            pipe.send(result)


def _end_with_parent() -> None:
    """Whatever runs in the other threads."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
