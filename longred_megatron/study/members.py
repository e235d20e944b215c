"""The models of a study: which there are, and how each is made, once."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from longred_megatron.checkpoint.merging import MERGE, merge
from longred_megatron.errors import UserError
from longred_megatron.files import read_json, write_text
from longred_megatron.parallel.local_ranks import run_to_end, training_command
from longred_megatron.recipe import dump_recipe, load_recipe
from longred_megatron.study.settings import Merge, Run, StudyFile

NUM_LOCAL_RANKS = min(2, os.cpu_count() or 1)  # a core each; the result does not depend on it


@dataclass(frozen=True)
class Member:
    """A model of a study. row: of the table; hf: where its Hugging Face folder is, or will be."""

    row: str
    seed: int
    hf: Path

    def exists(self) -> bool:
        """Whether it has been made."""
        return (self.hf / "config.json").is_file()


@dataclass(frozen=True)
class Trained(Member):
    """recipe, overrides: of its run."""

    recipe: Path
    overrides: tuple[str, ...]

    def command(self) -> str:
        """What a user would type."""
        return shlex.join(["-m", "longred_megatron.train", str(self.recipe), *self.overrides])

    def check(self) -> None:
        """Raises UserError when its recipe is not sound, or it was made by another one."""
        try:
            recipe, record = dump_recipe(load_recipe(self.recipe, self.overrides)), self._record
        except UserError as error:
            raise UserError(
                *(f"`runs.{self.row}` with the study's overrides: {each}" for each in error.problems)
            ) from None
        if self.exists() and not (record.is_file() and record.read_text(encoding="utf-8") == recipe):
            raise UserError(
                f"{self.hf.parent}: was made by another recipe than {self.recipe.name} with the study's overrides is "
                f"now (compare {record}); remove the folder, or give the study another `dir`"
            )

    def make(self, launch: Sequence[str] | None) -> None:
        """Trains it, by the words `launch`, or on this machine. A run that was stopped goes on."""
        write_text(self._record, dump_recipe(load_recipe(self.recipe, self.overrides)))
        words = training_command(self.recipe, NUM_LOCAL_RANKS)
        if launch is not None:
            words = [*launch, "-m", "longred_megatron.train", str(self.recipe)]
        run_to_end([*words, *self.overrides])

    @property
    def _record(self) -> Path:
        """The recipe as it was when the run began."""
        return self.hf.parent.with_name(f"{self.hf.parent.name}.yaml")


@dataclass(frozen=True)
class Merged(Member):
    """original, extended: the models between which it lies."""

    original: Path
    extended: Path
    method: str
    weight: float

    def command(self) -> str:
        """What a user would type."""
        models = [str(self.original), str(self.extended)]
        settings = ["--method", self.method, "--weight", f"{self.weight:g}", "--output", str(self.hf)]
        return shlex.join(["tools/merge.py", "--hf", *models, *settings])

    def check(self) -> None:
        """Raises UserError when what is there is another merge."""
        if self.exists():
            made = read_json(self.hf / MERGE)
            if (made["method"], made["weight"], made["extended"]) != (self.method, self.weight, str(self.extended)):
                raise UserError(
                    f"{self.hf}: is another merge than the study's; remove it, or give the study another `dir`"
                )

    def make(self, launch: Sequence[str] | None) -> None:
        """Merges it, in this process."""
        for merged in merge(self.original, self.extended, self.hf, self.method, [self.weight]):
            print(merged.summary(), flush=True)


def members(study: StudyFile) -> list[Trained | Merged]:
    """All models in the order in which they are made.

    Raises UserError for a `$NAME` that is no earlier run.
    """
    found: list[Trained | Merged] = []
    for name, run in study.runs.items():
        found += [_trained(study, name, run, seed) for seed in run.seeds or study.seeds]
    for name, merge_settings in study.merges.items():
        found += _merged(study, name, merge_settings)
    return found


def make(wanted: Sequence[Trained | Merged], launch: Sequence[str] | None) -> None:
    """Makes what is not there yet, one after another; all recipes are checked before."""
    for member in wanted:
        member.check()
    for number, member in enumerate(wanted, start=1):
        state = "is there" if member.exists() else member.command()
        print(f"[{number}/{len(wanted)}] {member.row}, seed {member.seed}: {state}", flush=True)
        if not member.exists():
            member.make(launch)


def _folder(study: StudyFile, name: str, seed: int) -> Path:
    return study.dir / "runs" / name / f"seed-{seed}"


def _trained(study: StudyFile, name: str, run: Run, seed: int) -> Trained:
    earlier = list(study.runs)[: list(study.runs).index(name)]
    exports = {each: str(_export(study, each, seed)) for each in earlier}
    texts = []
    for text in (*study.overrides, *run.overrides):
        try:
            texts.append(Template(text).substitute(exports))
        except (KeyError, ValueError) as error:
            known = ", ".join(earlier) or "none"
            raise UserError(
                f"`runs.{name}.overrides`: {text!r}: $ stands before the name of an earlier run ({known}), not {error}"
            ) from None
    folder = _folder(study, name, seed)
    own = (f"training.seed={seed}", f"run.dir={folder}")
    return Trained(name, seed, folder / "hf", run.recipe, (*texts, *own))


def _export(study: StudyFile, name: str, seed: int) -> Path:
    """Of the same seed, where the run has it; else of its first."""
    seeds = study.runs[name].seeds or study.seeds
    return _folder(study, name, seed if seed in seeds else seeds[0]) / "hf"


def _merged(study: StudyFile, name: str, settings: Merge) -> Iterator[Merged]:
    for weight in settings.weights:
        row = f"{name}-{weight:g}"
        for seed in study.runs[settings.run].seeds or study.seeds:
            extended = _folder(study, settings.run, seed) / "hf"
            output = _folder(study, row, seed) / "hf"
            yield Merged(row, seed, output, study.original, extended, settings.method, weight)
