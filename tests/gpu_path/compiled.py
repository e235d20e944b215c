"""A module in the place of Transformer Engine's compiled one: its names, read out of Transformer Engine's own Python.

Enums have the members that the Python uses; their numbers are our own, only compared with each other. A function that
`kernels.py` and `attention.py` do not give raises when it is called: nothing is answered by a stand-in that agrees.
"""

import re
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "transformer_engine_torch"
ENUM = re.compile(r"\b(NVTE_?[A-Z]\w*|CommOverlap\w+)\.([A-Z]\w*)\b")
ALIAS = re.compile(r"^(\w+) = tex\.(NVTE\w+)$", re.MULTILINE)
# What is counted with, or compared with a list: in the order of the compiled module's.
FIXED = {
    "DType": ["kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"],
    "FP8FwdTensors": [f"GEMM{i}_{what}" for i in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"GRAD_{what}{i}" for i in (1, 2, 3) for what in ("OUTPUT", "INPUT")],
}


def sources() -> list[Path]:
    """Transformer Engine's Python for torch, in a fixed order; empty where the package is not installed."""
    spec = find_spec("transformer_engine")
    folders = spec.submodule_search_locations if spec else None
    return sorted(Path(folders[0], "pytorch").rglob("*.py")) if folders else []


def enums() -> dict[str, type[IntEnum]]:
    """The compiled module's enums, by name."""
    members: dict[str, dict[str, None]] = {name: dict.fromkeys(fixed) for name, fixed in FIXED.items()}
    for source in sources():
        text = source.read_text()
        for alias, name in ALIAS.findall(text):
            text = re.sub(rf"\b{alias}\.", f"{name}.", text)
        for name, member in ENUM.findall(text):
            members.setdefault(name, {})[member] = None
    return {name: IntEnum(name, list(found), start=0) for name, found in members.items()}


def functions() -> set[str]:
    """Names of what Transformer Engine's Python calls of the compiled module, or imports from it."""
    found: set[str] = set()
    for source in sources():
        text = source.read_text()
        found.update(re.findall(r"(?<![\w.])tex\.([a-z]\w*)", text))
        for names in re.findall(rf"^from {NAME} import (?:\(([^)]*)\)|(.*))$", text, re.MULTILINE):
            found.update(re.findall(r"\b[a-z]\w*", "".join(names)))
    return found


class FP8TensorMeta:
    """Scales of one direction of a module; Transformer Engine fills in `scale` and `amax_history`."""


class Compiled(ModuleType):
    """The stand-in itself; `calls` counts what was run of it, so that a test can say that the path was taken."""

    def __init__(self, kernels: dict[str, Callable[..., Any]]) -> None:
        super().__init__(NAME)
        self.calls: Counter[str] = Counter()
        for name, enum in enums().items():
            setattr(self, name, enum)
        self.FP8TensorMeta = FP8TensorMeta
        for name in functions() | set(kernels):
            setattr(self, name, self._function(name, kernels.get(name)))

    def _function(self, name: str, kernel: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if kernel is None:
                raise NotImplementedError(f"{NAME}.{name} has no plain torch form in tests/gpu_path/")
            self.calls[name] += 1
            return kernel(*arguments, **settings)

        call.__name__ = name
        return call

    def __getattr__(self, name: str) -> type:
        if not name[0].isupper():
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))  # a class that annotations name
        return getattr(self, name)
