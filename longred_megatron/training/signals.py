"""A request to stop (SIGTERM from a scheduler, Ctrl-C) becomes a checkpoint after the current step."""

import signal
import sys
from types import FrameType
from typing import Self

import torch


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        print(
            f"{signal.Signals(number).name}: stopping with a checkpoint after this step; again to stop at once",
            file=sys.stderr,
        )
        signal.signal(number, self._previous[signal.Signals(number)])

    def agreed(self) -> int | None:
        """The signal any rank has received, the same answer on every rank, so that all stop after the same step."""
        largest = torch.tensor([self.signal or 0], device=torch.cuda.current_device())
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # the world: all ranks save together
        return int(largest) or None
