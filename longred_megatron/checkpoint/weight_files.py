"""The safetensors files of a Hugging Face folder, read tensor by tensor where they are needed."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from longred_megatron.dtypes import SAFETENSORS_DTYPES
from longred_megatron.errors import UserError
from longred_megatron.families import Architecture

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Buffers that older versions of transformers saved; they are computed from config.json.
_HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)
_MAX_LISTED = 5


class WeightFiles:
    """The tensors of one Hugging Face folder. Opening it reads only the files' headers.

    Raises:
        UserError: no safetensors files, one that the index names is missing, a broken one, or one without a
            tensor the index says it has.
    """

    def __init__(self, hf: Path) -> None:
        self.hf = Path(hf)
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            listed = _listed_tensors(self.hf)
            for file in sorted(set(listed.values())):
                opened = self._open(self.hf / file)
                self._files |= dict.fromkeys(opened.keys(), opened)
            lost = [name for name in listed if name and name not in self._files]
            if lost:
                raise UserError(
                    f"{self.hf / INDEX}: lists tensors that the files do not hold: {_first(lost)}; "
                    "download the model again"
                )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Any:
        """The tensor as something to index: `files[name][0:10]` reads ten rows."""
        return self._files[name].get_slice(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tuple(self[name].get_shape()) for name in self._files}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Tensor name -> dtype. Raises UserError for anything but fp32, fp16 and bf16."""
        named = {name: self[name].get_dtype() for name in self._files if not name.endswith(_HARMLESS_SUFFIXES)}
        other = [f"{name} ({dtype})" for name, dtype in named.items() if dtype not in SAFETENSORS_DTYPES]
        if other:
            raise UserError(
                f"{self.hf}: tensors must be fp32, fp16 or bf16, not {_first(other)}; "
                "use the model that is not quantised"
            )
        return {name: SAFETENSORS_DTYPES[dtype] for name, dtype in named.items()}

    def check(self, architecture: Architecture) -> None:
        """Raises UserError unless the tensors are those of `architecture`, in number format and shape too."""
        expected, found = architecture.tensor_shapes(), self.shapes()
        problems = []
        missing = [name for name in expected if name not in found]
        if missing:
            problems.append(
                f"{self.hf}: {len(missing)} tensors that config.json asks for are missing: "
                f"{_first(missing)}; download the model again, or correct config.json"
            )
        optional = {architecture.head_name} if architecture.tied_embeddings else set()
        extra = [n for n in found if n not in expected.keys() | optional and not n.endswith(_HARMLESS_SUFFIXES)]
        if extra:
            problems.append(
                f"{self.hf}: {len(extra)} tensors have no place in a {architecture.family} model with "
                f"config.json's settings: {_first(extra)}; check config.json (adapters and quantised weights "
                "are not supported)"
            )
        expected |= dict.fromkeys(optional, expected[architecture.embedding_name])
        wrong = [
            f"{name}: got {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if wrong:
            problems.append(
                f"{self.hf}: {len(wrong)} tensors have shapes that config.json does not give: {_first(wrong)}"
            )
        if problems:
            raise UserError(*problems)
        self.dtypes()

    def _open(self, file: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{file}: not found, but {INDEX} names it; download the file") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def _listed_tensors(hf: Path) -> dict[str, str]:
    """Tensor name -> file name; for a single file, which needs no list, the name is empty."""
    if (hf / SINGLE).is_file():
        return {"": SINGLE}
    index = hf / INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error!r}); download it again") from None
    if hf.is_dir() and any(path.suffix in PICKLES for path in hf.iterdir()):
        raise UserError(f"{hf}: holds only pickled weights (*.bin); convert to safetensors; pickles are never loaded")
    raise UserError(f"{hf}: neither {SINGLE} nor {INDEX} is there; `hf` must be a folder with a model's weights")


def _first(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
