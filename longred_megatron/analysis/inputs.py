"""What the studies of models take: Hugging Face folders, checkpoints of runs, and texts; and the flags for them."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longred_megatron.analysis.measure import Ranks, study_device
from longred_megatron.analysis.network import Network
from longred_megatron.checkpoint.distributed import read_description
from longred_megatron.checkpoint.of_run import checkpoints_to_study, exported
from longred_megatron.data.sequences import IndexedSequences, check_tokens
from longred_megatron.data.tokenizer import check_same_tokenizer
from longred_megatron.errors import UserError, listed
from longred_megatron.evaluation.models import read_facts, resolve_dtype
from longred_megatron.evaluation.report import check_output
from longred_megatron.evaluation.subjects import default_names
from longred_megatron.evaluation.texts import cut_windows, load_encoder, text_source
from longred_megatron.families import Architecture, read_architecture

MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Model:
    """A model that a study opens. step: of the checkpoint that it is; None for a Hugging Face folder."""

    name: str
    path: Path
    architecture: Architecture
    step: int | None = None

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A Hugging Face folder with it; of a checkpoint a temporary one."""
        if self.step is None:
            yield self.path
            return
        with exported(self.path) as hf:
            yield hf

    @contextmanager
    def opened(self) -> Iterator[Network]:
        """Its network, for this rank's device."""
        device = study_device()
        with self.folder() as hf:
            yield Network(hf, resolve_dtype("auto", device), device)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self.path), "step": self.step, "rope": self.architecture.rope}


def add_arguments(parser: ArgumentParser, hf: str, length: str, texts: int) -> None:
    """The flags that studies have in common. hf, length: what they mean there."""
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--hf", nargs="+", required=True, **folder, help=hf)
    parser.add_argument(  # not --run: torchrun takes that for a short form of its own --run-path
        "--runs", nargs="*", default=[], **folder, help="run folders: each of their checkpoints is one more model"
    )
    parser.add_argument("--output", required=True, **folder, help="folder for the numbers and the page")
    parser.add_argument(
        "--text", nargs="*", default=[], metavar="PATH",
        help="text files or folders, or one prefix of tools/prepare_data.py; none: Python's standard library",
    )  # fmt: skip
    parser.add_argument("--texts", default=texts, **number, help="number of texts (%(default)s)")
    parser.add_argument("--length", **number, help=length)
    parser.add_argument("--seed", default=2024, **number, help="choice of the texts (%(default)s)")


def models_of(options: Namespace, kind: str, ranks: Ranks) -> list[Model]:
    """The models of --hf, then the checkpoints of --runs by step, after a look at the output folder.

    Raises:
        UserError: one is no model or of an unknown family, a run has no checkpoints, two cannot be compared, or the
            output holds something else.
    """
    ranks.check(lambda: check_output(options.output, kind))
    check_number("texts", options.texts, 1)
    found = [Model(name, hf, _architecture(hf)) for name, hf in zip(_names(options.hf), options.hf, strict=True)]
    for run in options.runs:
        steps = checkpoints_to_study(run)
        found += [Model(f"{run.name} step {k}", path, read_description(path).architecture, k) for k, path in steps]
    return found


def check_comparable(models: Sequence[Model]) -> None:
    """Raises UserError unless all models have the first one's layers, heads, width, vocabulary and tokenizer."""
    first, *others = models
    for other in others:
        for what in ("num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"):
            ours, theirs = getattr(first.architecture, what), getattr(other.architecture, what)
            if ours != theirs:
                raise UserError(
                    f"{other.path}: cannot be compared with {first.path}: {what} is {theirs}, there {ours}; compare "
                    "models that were made from one"
                )
        if other.step is None:
            check_same_tokenizer(first.path, other.path)


def texts_of(options: Namespace, model: Model, length: int) -> Tensor:
    """[--texts, length] tokens of the model's tokenizer.

    Raises:
        UserError: the texts are too short for as many.
    """
    check_number("length", length, 2)
    prefix, count = options.text[0] if len(options.text) == 1 else "", options.texts
    if prefix and Path(f"{prefix}.idx").is_file():
        check_tokens(prefix, model.architecture.vocab_size)
        sequences = IndexedSequences(prefix, length - 1, (options.seed,))
        tokens = torch.stack([torch.from_numpy(sequences[i]) for i in range(min(count, sequences.pieces_per_epoch))])
    else:
        source = text_source([Path(path) for path in options.text])
        tokens = cut_windows(source, load_encoder(model.path), length, count, options.seed).tokens
    if len(tokens) < count:
        raise UserError(
            f"the texts give {len(tokens)} windows of {length} tokens, --texts asks for {count}; give more text, "
            f"fewer --texts or a smaller --length"
        )
    return tokens


def check_number(key: str, value: int, least: int) -> None:
    """Raises UserError where the flag's value is too small or absurd."""
    if not least <= value <= MOST_TOKENS:
        raise UserError(f"--{key} {value}: must be {least} to {MOST_TOKENS:,}")


def check_layers(layers: Sequence[int], model: Model) -> list[int]:
    """The layers asked for; none: the first, the middle and the last. Raises UserError for one that is not there."""
    depth = model.architecture.num_layers
    if outside := [layer for layer in layers if not 1 <= layer <= depth]:
        raise UserError(f"--layers {listed(outside)}: the layers of {model.path} are 1 to {depth}")
    return sorted(set(layers or (1, (depth + 1) // 2, depth)))


def _architecture(hf: Path) -> Architecture:
    read_facts(hf)
    return read_architecture(hf)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, of an export, which is always called hf, its run's."""
    runs = [hf.parent if hf.name == "hf" else hf for hf in (folder.absolute() for folder in folders)]
    return default_names(runs) or [run.name for run in runs]
