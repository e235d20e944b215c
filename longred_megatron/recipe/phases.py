"""The phases of a run: what each trains, with which models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from longred_megatron.families import Architecture, read_architecture
from longred_megatron.objectives.base import Needs, Site
from longred_megatron.recipe.auto_layers import spread, with_layers
from longred_megatron.recipe.load import phases_of
from longred_megatron.recipe.schema import Recipe
from longred_megatron.rope import RopeSource


@dataclass(frozen=True)
class Phase:
    """A part of a run with settings of its own; the whole run where its recipe has no phases."""

    recipe: Recipe  # the run's with this phase's changes
    source: Architecture  # of model.hf, as released
    teachers: Mapping[Path, Architecture]  # by their folders, those that an objective of the phase compares with
    number: int = 1
    steps_before: int = 0  # of the phases before
    tokens_before: int = 0
    caches_are_full: bool = False  # see `with_full_caches`

    @cached_property
    def sites(self) -> dict[str, Site]:
        """What each objective may know."""
        alone, sites = _site(self.recipe, self.source, self.source), {}
        for name, settings in self.recipe.objectives.items():
            others = {} if settings.needs(alone).teacher_is_student else self.teachers
            sites[name] = replace(alone, teacher=others.get(self.recipe.teacher_of(name).hf, self.source))
        return sites

    @property
    def rope_source(self) -> RopeSource:
        """What the RoPE method may know."""
        source, window = self.source, self.recipe.model.max_position_embeddings
        return RopeSource(source.rope, source.head_dim, source.max_position_embeddings, window)

    @cached_property
    def needs(self) -> dict[str, Needs]:
        """What each objective needs of the models."""
        return {name: settings.needs(self.sites[name]) for name, settings in self.recipe.objectives.items()}

    def teacher_of(self, objective: str) -> Path | None:
        """The folder of the frozen model that an objective compares with; None where it needs none."""
        needs = self.needs[objective]
        return self.recipe.teacher_of(objective).hf if needs.teacher and not needs.teacher_is_student else None

    def taught_by(self, teacher: Path) -> dict[str, Needs]:
        """The objectives that compare with a teacher, and what they need."""
        return {name: needs for name, needs in self.needs.items() if self.teacher_of(name) == teacher}

    def caches(self) -> dict[str, Path]:
        """{objective: the folder that keeps what its teacher says}, of those that have one."""
        folders = {name: self.recipe.teacher_of(name).cache for name in self.needs if self.teacher_of(name)}
        return {name: folder for name, folder in folders.items() if folder is not None}

    @cached_property
    def with_full_caches(self) -> "Phase":
        """The same with caches that have all that the teachers say."""
        return replace(self, caches_are_full=True)

    def teacher_depth(self, objective: str) -> int:
        """The last layer of its teacher that has to run for an objective; 0: none."""
        if self.caches_are_full and objective in self.caches():
            return 0
        return self.needs[objective].teacher_depth(self.sites[objective].teacher.num_layers)

    def teacher_head(self, objective: str) -> bool:
        """Whether its teacher's head has to run for an objective."""
        needs = self.needs[objective]
        kept = self.caches_are_full and objective in self.caches() and needs.teacher_entries is not None
        return needs.teacher_head and not kept

    @property
    def last_step(self) -> int:
        """Steps are numbered from 1 over the whole run."""
        return self.steps_before + self.recipe.training.steps

    @property
    def last_token(self) -> int:
        """Tokens trained by the end of the phase."""
        step_tokens = self.recipe.num_microbatches * self.recipe.step.tokens_per_microbatch
        return self.tokens_before + self.recipe.training.steps * step_tokens


def read_phases(recipe: Recipe) -> list[Phase]:
    """The phases in order, with the config.json of model and teachers read.

    `layers: {auto: N}` that has not been chosen stands for N layers at equal distances: what they cost is the same.

    Raises:
        UserError: as `read_architecture`, or N is more than the model's layers.
    """
    source = read_architecture(recipe.model.hf)
    recipe = with_layers(recipe, lambda count: spread(count, source.num_layers))
    phases: list[Phase] = []
    for number, own in enumerate(phases_of(recipe), start=1):
        teachers = {hf: source if hf == recipe.model.hf else read_architecture(hf) for hf in _teachers(own, source)}
        before = (phases[-1].last_step, phases[-1].last_token) if phases else (0, 0)
        phases.append(Phase(own, source, teachers, number, *before))
    return phases


def _teachers(recipe: Recipe, source: Architecture) -> list[Path]:
    """The folders of the teachers that are needed; whether one is does not depend on what is in it."""
    site = _site(recipe, source, source)
    needs = {name: settings.needs(site) for name, settings in recipe.objectives.items()}
    taught = [name for name, each in needs.items() if each.teacher and not each.teacher_is_student]
    return list(dict.fromkeys(recipe.teacher_of(name).hf for name in taught))


def _site(recipe: Recipe, source: Architecture, teacher: Architecture) -> Site:
    return Site(
        student=source,
        teacher=teacher,
        target_window=recipe.model.max_position_embeddings,
        tokens_per_microbatch=recipe.step.tokens_per_microbatch,
        parallel=recipe.parallel,
        precision=recipe.precision,
    )
