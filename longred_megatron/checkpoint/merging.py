"""Weights between those of an original model and of its extended form: the baseline "model merging" of LongReD.

LongReD (arXiv 2502.07365) reports merging among its baselines; method and weight are not published. Linear: the average
of Wortsman et al. (arXiv 2109.01903, between a model and its fine-tuned form). Spherical: along the great circle
(Shoemake, "Animating rotation with quaternion curves", 1985), of each tensor as one vector.
"""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from longred_megatron.checkpoint.hf_config import CONFIG, copy_companions, write_json
from longred_megatron.checkpoint.huggingface import check_free
from longred_megatron.checkpoint.weight_files import INDEX, WeightFiles
from longred_megatron.data.tokenizer import tokenizer_differences
from longred_megatron.dtypes import SAFETENSORS_DTYPES
from longred_megatron.errors import UserError, listed
from longred_megatron.families import Architecture, read_architecture
from longred_megatron.files import appearing_folder, try_output

MERGE = "merge.json"  # in a merged folder: what it was made of
BLOCK_ELEMENTS = 1 << 24  # of each model in memory: 64 MB in fp32
NEARLY_PARALLEL = (
    1e-6  # radians; below, an angle is noise of its cosine, and the two methods differ by 1e-12 of a weight
)

Shares = Callable[["Inner", float], tuple[float, float]]


class Inner(NamedTuple):
    """Inner products of the original tensor x and the extended one y, as vectors: x.x, y.y and x.y, in fp64."""

    original: float
    extended: float
    both: float

    @property
    def angle(self) -> float:
        """Between x and y, in radians; 0 where one of them is zero. In fp64 it is good to `NEARLY_PARALLEL`."""
        norms = math.sqrt(self.original) * math.sqrt(self.extended)
        return math.acos(min(1.0, max(-1.0, self.both / norms))) if norms else 0.0


def linear(inner: Inner, weight: float) -> tuple[float, float]:
    """Factors of original and extended: 1 - weight and weight."""
    return 1 - weight, weight


def spherical(inner: Inner, weight: float) -> tuple[float, float]:
    """sin((1 - weight) angle) / sin(angle) and sin(weight angle) / sin(angle).

    Linear where the two are nearly parallel, and where they are nearly opposite: there no great circle is the shortest.
    """
    sine = math.sin(inner.angle)
    if sine < NEARLY_PARALLEL:
        return linear(inner, weight)
    return math.sin((1 - weight) * inner.angle) / sine, math.sin(weight * inner.angle) / sine


METHODS: dict[str, Shares] = {"linear": linear, "spherical": spherical}


@dataclass(frozen=True)
class Merge:
    """What was written. angles: of every tensor, in degrees, between original and extended."""

    folder: Path
    angles: Mapping[str, float]

    def summary(self) -> str:
        """One line for the user."""
        name = max(self.angles, key=lambda each: self.angles[each])
        apart = f"at most {self.angles[name]:.2g} degrees apart ({name})"
        return f"{self.folder}: written; the two models' tensors are {apart}"


def output_folders(output: Path, weights: Sequence[float]) -> dict[float, Path]:
    """Where the model of each weight goes: `output` itself, or a folder for each of several in it."""
    return {weight: output if len(weights) == 1 else output / f"weight-{weight:g}" for weight in weights}


def merge(original: Path, extended: Path, output: Path, method: str, weights: Sequence[float]) -> Iterator[Merge]:
    """Writes a Hugging Face folder for each weight: its share of the extended model, 0 to 1.

    Each tensor has the extended model's dtype and lies in a file of the same name; config.json (RoPE and window),
    tokenizer and other files are the extended model's. Blocks of `BLOCK_ELEMENTS` of each model are in memory. A folder
    appears when it is whole.

    Raises:
        UserError: weights out of range, models that are not two states of one, or `output` is in use or cannot be
            written; all found before anything is written.
    """
    folders = _checked_folders(output, weights)
    architecture = _common_architecture(original, extended)
    with WeightFiles(original) as x, WeightFiles(extended) as y:
        x.check(architecture)
        y.check(architecture)
        for weight, folder in folders.items():
            with appearing_folder(folder) as unfinished:
                angles = _write_tensors(unfinished, architecture, x, y, METHODS[method], weight)
                copy_companions(extended, unfinished)
                (unfinished / CONFIG).write_bytes((extended / CONFIG).read_bytes())
                made_of = {"original": str(original.absolute()), "extended": str(extended.absolute())}
                write_json(unfinished / MERGE, {"method": method, "weight": weight, **made_of})
            yield Merge(folder, angles)


def _checked_folders(output: Path, weights: Sequence[float]) -> dict[float, Path]:
    problems = [
        f"--weight {weight:g}: must be 0 to 1, the share of the extended model"
        for weight in weights
        if not 0 <= weight <= 1
    ]
    folders = output_folders(output, weights)
    if len(set(folders.values())) < len(weights):
        problems.append(f"--weight {listed(f'{weight:g}' for weight in weights)}: one is given twice; give each once")
    if problems:
        raise UserError(*problems)
    for folder in folders.values():
        try_output(folder, "--output")
        check_free(folder)
    return folders


def _common_architecture(original: Path, extended: Path) -> Architecture:
    """What both models are, but for RoPE and window; with the extended one's."""
    x, y = read_architecture(original), read_architecture(extended)
    x = replace(x, rope=y.rope, max_position_embeddings=y.max_position_embeddings)
    names = [field.name for field in fields(Architecture)]
    problems = [
        f"{name} is {getattr(x, name)!r} and {getattr(y, name)!r}"
        for name in names
        if getattr(x, name) != getattr(y, name)
    ]
    problems += tokenizer_differences(original, extended)
    if original.resolve() == extended.resolve():
        problems.append("they are one folder")
    if problems:
        raise UserError(
            f"{original} and {extended} cannot be merged: {'; '.join(problems)}; give a model and what was made of it"
        )
    return y


def _write_tensors(
    folder: Path, architecture: Architecture, x: WeightFiles, y: WeightFiles, shares: Shares, weight: float
) -> dict[str, float]:
    """Writes the weight files. Returns the angle in degrees of each tensor."""
    shapes = architecture.tensor_shapes()
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in sorted(shapes):
        by_file[y.path(name).name].append(name)
    angles: dict[str, float] = {}
    title = f"merging, weight {weight:g}"
    with tqdm(total=len(shapes), desc=title, unit=" tensors", disable=None) as progress:
        for file, names in sorted(by_file.items()):
            with (folder / file).open("wb") as target:
                for name in _begin_file(target, names, y):
                    inner = _inner_products(x[name], y[name])
                    angles[name] = math.degrees(inner.angle)
                    _write_tensor(target, x[name], y[name], shares(inner, weight))
                    progress.update()
    if len(by_file) > 1:
        total = sum(math.prod(shapes[name]) * dtype.itemsize for name, dtype in y.dtypes().items() if name in shapes)
        weight_map = {name: y.path(name).name for name in sorted(shapes)}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return angles


def _begin_file(target: BinaryIO, names: Sequence[str], files: WeightFiles) -> list[str]:
    """Writes the header of a safetensors file: 8 bytes of its length, JSON, blanks up to a multiple of 8.

    Returns the order in which the tensors have to follow: by size of an element, so that each is aligned.
    """
    order = sorted(names, key=lambda name: (-SAFETENSORS_DTYPES[files[name].get_dtype()].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = files[name].get_dtype(), list(files[name].get_shape())
        begin, end = end, end + math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(struct.pack("<Q", len(text)) + text)
    return order


def _blocks(tensor: Any) -> Iterator[Tensor]:
    """The tensor in a safetensors file by rows, at most `BLOCK_ELEMENTS` of them together where a row has fewer."""
    rows, *rest = tensor.get_shape()
    step = max(1, BLOCK_ELEMENTS // math.prod(rest))
    for start in range(0, rows, step):
        yield tensor[start : start + step]


def _inner_products(x: Any, y: Any) -> Inner:
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(_blocks(x), _blocks(y), strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        sums += torch.stack([a.dot(a), b.dot(b), a.dot(b)])
    return Inner(*sums.tolist())


def _write_tensor(target: BinaryIO, x: Any, y: Any, factors: tuple[float, float]) -> None:
    """factors[0] x + factors[1] y, computed in fp32 and rounded once, to y's dtype."""
    for a, b in zip(_blocks(x), _blocks(y), strict=True):
        merged = (factors[0] * a.float() + factors[1] * b.float()).to(b.dtype)
        target.write(merged.contiguous().view(torch.uint8).numpy().tobytes())
