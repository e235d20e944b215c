"""Live tensors by part while something runs: bytes of storages, counted where each is made and freed."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that operations make while it is entered, and of those that it is told of.

    `mark` gives storages a part; what has none counts as "activations". `peak` is the largest sum since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, str] = {}
        self.sizes: dict[int, int] = {}
        self._guards: dict[int, Any] = {}
        self.total = 0
        self.reset()

    def reset(self) -> None:
        """Peaks are looked for from here on."""
        self.peak, self.at_peak = self.total, self.by_part()

    def by_part(self) -> dict[str, int]:
        """Live bytes now."""
        found: Counter[str] = Counter()
        for key, size in list(self.sizes.items()):  # a copy: a collection may free some while this goes on
            found[self.parts.get(key, "activations")] += size
        return dict(found)

    def mark(self, tensors: Iterable[Tensor], part: str) -> None:
        """These tensors' storages belong to `part` from now on."""
        for tensor in tensors:
            self._see(tensor)
            self.parts[id(tensor.untyped_storage())] = part

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.by_part()
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._guards or tensor.is_meta:
            return
        self.sizes[key] = storage.nbytes()
        self.total += self.sizes[key]
        self._guards[key] = weakref.finalize(storage, self._forget, key)
        self._guards[key].atexit = False

    def _forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key)
        self.parts.pop(key, None)
        del self._guards[key]
