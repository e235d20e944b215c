"""The models to measure: Hugging Face folders, and the checkpoints of runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import realpath
from pathlib import Path

import torch

from longred_megatron.checkpoint.of_run import checkpoints_to_study, exported
from longred_megatron.errors import UserError
from longred_megatron.evaluation.models import CausalModel, ModelFacts, load_model, read_facts
from longred_megatron.evaluation.texts import TextEncoder, load_encoder


@dataclass(frozen=True)
class Subject:
    """A model before its weights are read. run, step: of the checkpoint that it is; None for a Hugging Face folder."""

    name: str
    facts: ModelFacts
    encoder: TextEncoder
    run: str | None = None
    step: int | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> CausalModel:
        """The model with its weights; of a checkpoint by way of a temporary Hugging Face folder.

        Raises `UserError` when it cannot be loaded, or a checkpoint's tokenizer is not the one that was taken for it.
        """
        if self.step is None:
            return load_model(self.facts, self.name, self.encoder, device, dtype)
        with exported(self.facts.path) as hf:
            if load_encoder(hf).fingerprint != self.encoder.fingerprint:
                raise UserError(
                    f"{self.facts.path}: its tokenizer is not that of the first model; give the model that the run "
                    "started from as the first --hf"
                )
            model = load_model(replace(self.facts, path=hf), self.name, self.encoder, device, dtype)
        return replace(model, facts=self.facts)


def subjects_of(
    models: Sequence[Path], runs: Sequence[Path], reference: Path | None, names: Sequence[str]
) -> list[Subject]:
    """The folders of `models` with their `names`, default the shortest ends of their paths that differ, then the
    checkpoints of `runs` by step. A `reference` that is not among them is the first.

    Raises `UserError` with everything that is wrong with what the user typed.
    """
    problems = _given_wrongly(models, runs, names)
    extra = [] if reference is None or realpath(reference) in {realpath(model) for model in models} else [reference]
    facts = _all_of(read_facts, [*extra, *models], problems)
    found = _all_of(checkpoints_to_study, runs, problems)
    if problems:
        raise UserError(*problems)
    all_names = [*default_names(extra), *names] if names else default_names([*extra, *models])
    folders = [Subject(name, fact, load_encoder(fact.path)) for name, fact in zip(all_names, facts, strict=True)]
    series = [
        _checkpoint(name, step, path, folders[0].encoder)
        for name, of_run in zip(default_names(runs), found, strict=True)
        for step, path in of_run
    ]
    return folders + series


def _given_wrongly(models: Sequence[Path], runs: Sequence[Path], names: Sequence[str]) -> list[str]:
    problems = []
    if not models:
        problems.append("--hf: no model given; name at least one Hugging Face folder")
    if names and len(names) != len(models):
        problems.append(f"--name: {len(names)} names for {len(models)} models; give one for each --hf")
    if len(set(names)) != len(names):
        problems.append("--name: a name is given twice; names must differ")
    for flag, paths in (("--hf", models), ("--runs", runs)):
        if len({realpath(path) for path in paths}) != len(paths):
            problems.append(f"{flag}: a folder is given twice; name each once")
    return problems


def _all_of[T](read: Callable[[Path], T], paths: Sequence[Path], problems: list[str]) -> list[T]:
    """What `read` makes of each path. What it raises is added to `problems`."""
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except UserError as error:
            problems += error.problems
    return found


def default_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: runs/a/hf and runs/b/hf give a/hf and b/hf."""
    parts = [Path(realpath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return []


def _checkpoint(run: str, step: int, path: Path, first: TextEncoder) -> Subject:
    """With the tokenizer of the model it was made from or, where that is gone, of the first model."""
    from longred_megatron.checkpoint.distributed import read_description  # imports Megatron, which takes seconds

    description = read_description(path)
    architecture = description.architecture
    facts = ModelFacts(
        path=path,
        family=architecture.family,
        max_position_embeddings=architecture.max_position_embeddings,
        rope=architecture.rope,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
    )
    encoder = load_encoder(description.source_hf) if description.source_hf.is_dir() else first
    return Subject(f"{run} step {step}", facts, encoder, run, step)
