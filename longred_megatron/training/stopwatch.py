"""Seconds that parts of a step take on the device, measured without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longred_megatron.device import on_gpu


class Stopwatch:
    """On a GPU by events in the current stream, which lie between what was asked for before and after them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds what the block asks for."""
        if on_gpu():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Of all parts. The device has to be past them, as when a number that was computed later has been read."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000  # of milliseconds
