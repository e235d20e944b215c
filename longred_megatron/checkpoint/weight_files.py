"""The safetensors files of a Hugging Face folder, read tensor by tensor where they are needed."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longred_megatron.dtypes import SAFETENSORS_DTYPES
from longred_megatron.errors import UserError, first_few
from longred_megatron.families import Architecture
from longred_megatron.files import read_json, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Buffers that older versions of transformers saved; they are computed from config.json.
HARMLESS_SUFFIXES = ("rotary_emb.inv_freq",)


class WeightFiles:
    """The tensors of one Hugging Face folder. Opening it reads only the files' headers.

    Raises:
        UserError: no safetensors files, one that the index names is missing, a broken one, or one without a
            tensor the index says it has.
    """

    def __init__(self, hf: Path) -> None:
        self.hf = Path(hf)
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._paths: dict[str, Path] = {}  # tensor name -> its file
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            listed = _listed_tensors(self.hf)
            for file in sorted(set(listed.values())):
                opened = self._open(self.hf / file)
                for name in tuple(opened.keys()):
                    if name in self._files:
                        raise UserError(
                            f"{self.hf}: {self._paths[name].name} and {file} both hold the tensor {name}; remove the "
                            f"one that does not belong there, and its entry in {INDEX}"
                        )
                    self._files[name], self._paths[name] = opened, self.hf / file
            lost = [n for n, file in listed.items() if n and (n not in self._files or self._paths[n].name != file)]
            if lost:
                raise UserError(
                    f"{self.hf / INDEX}: lists tensors that their files do not hold: {first_few(lost)}; "
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
        """The tensor as something to index: `files[name][0:10]` reads ten rows.

        Indexing it raises UserError where the file cannot be read, or holds NaN or infinite numbers.
        """
        return _FiniteSlice(name, self._paths[name], self._files[name].get_slice(name))

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tuple(self[name].get_shape()) for name in self._files}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Tensor name -> dtype. Raises UserError for anything but fp32, fp16 and bf16."""
        named = {name: self[name].get_dtype() for name in self._files if not name.endswith(HARMLESS_SUFFIXES)}
        other = [f"{name} ({dtype})" for name, dtype in named.items() if dtype not in SAFETENSORS_DTYPES]
        if other:
            raise UserError(
                f"{self.hf}: tensors must be fp32, fp16 or bf16, not {first_few(other)}; "
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
                f"{first_few(missing)}; download the model again, or correct config.json"
            )
        optional = {architecture.head_name} if architecture.tied_embeddings else set()
        extra = [n for n in found if n not in expected.keys() | optional and not n.endswith(HARMLESS_SUFFIXES)]
        if extra:
            problems.append(
                f"{self.hf}: {len(extra)} tensors have no place in a {architecture.family} model with "
                f"config.json's settings: {first_few(extra)}; check config.json (adapters and quantised weights "
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
                f"{self.hf}: {len(wrong)} tensors have shapes that config.json does not give: {first_few(wrong)}"
            )
        if problems:
            raise UserError(*problems)
        self.dtypes()

    def _open(self, file: Path) -> Any:
        try:
            if file.exists() and not file.is_file():
                raise ValueError("it is no file but a folder, a pipe or a device")
            return self._stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{file}: not found, but {INDEX} names it; download the file") from None
        except Exception as error:  # of safetensors, whatever its header ends in
            raise UserError(f"{file}: not a whole safetensors file ({reason(error)}); download it again") from None


class _FiniteSlice:
    """A tensor of a safetensors file. What is read of it has been looked at: it has neither NaN nor infinity."""

    def __init__(self, name: str, file: Path, inner: Any) -> None:
        self._name, self._file, self._inner = name, file, inner
        self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

    def __getitem__(self, index: Any) -> Tensor:
        try:
            part: Tensor = self._inner[index]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file}: {self._name} cannot be read ({reason(error)}); try again") from None
        # A sum is finite in nearly all cases, and takes no memory; where it is not it may just be too large.
        if not part.sum().isfinite() and not (finite := part.isfinite()).all():
            count = int((~finite).sum())
            raise UserError(
                f"{self._file}: the tensor {self._name} holds {count:,} NaN or infinite numbers; download the file "
                "again, or use a checkpoint of before the training went wrong"
            )
        return part


def _checked_map(index: Any) -> dict[str, str]:
    """The `weight_map` of an index. Raises ValueError unless it names files of its own folder."""
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError("it has no weight_map, tensor name -> file name")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"it has {name} in {file!r:.100}, which is not the name of a safetensors file beside it")
    return listed


def _listed_tensors(hf: Path) -> dict[str, str]:
    """Tensor name -> file name; for a single file, which needs no list, the name is empty."""
    if os.path.lexists(hf / SINGLE):
        return {"": SINGLE}
    index = hf / INDEX
    if os.path.lexists(index):
        try:
            return _checked_map(read_json(index))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{index}: not an index of safetensors files ({reason(error)}); download it again"
            ) from None
    if hf.is_dir() and any(path.suffix in PICKLES for path in hf.iterdir()):
        raise UserError(f"{hf}: holds only pickled weights (*.bin); convert to safetensors; pickles are never loaded")
    raise UserError(f"{hf}: neither {SINGLE} nor {INDEX} is there; `hf` must be a folder with a model's weights")
