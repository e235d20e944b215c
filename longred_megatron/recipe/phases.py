"""The phases of a run: what each trains, whether it can, and what is printed of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from longred_megatron.families import Architecture, read_architecture
from longred_megatron.recipe.checks import check_recipe
from longred_megatron.recipe.load import phases_of
from longred_megatron.recipe.schema import Recipe
from longred_megatron.recipe.summary import in_columns, summary_lines


@dataclass(frozen=True)
class Phase:
    """A part of a run with settings of its own; the whole run where its recipe has no phases."""

    recipe: Recipe  # the run's with this phase's changes
    teacher: Architecture | None  # None: no objective of the phase needs one
    number: int  # from 1
    steps_before: int  # of the phases before
    tokens_before: int

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
    """The phases in order, with their teachers' config.json read. Raises UserError as `read_architecture` does."""
    phases: list[Phase] = []
    for number, own in enumerate(phases_of(recipe), start=1):
        teacher = read_architecture(own.teacher.hf) if own.needs_teacher else None
        before = (phases[-1].last_step, phases[-1].last_token) if phases else (0, 0)
        phases.append(Phase(own, teacher, number, *before))
    return phases


def check_phases(
    phases: Sequence[Phase], architecture: Architecture, world_size: int, *, gpu: bool | None = None
) -> list[str]:
    """The problems `check_recipe` finds in each phase, after its path; those that all phases share come once."""
    recipes = [phase.recipe for phase in phases]
    found = [check_recipe(p.recipe, architecture, p.teacher, world_size, gpu=gpu, phases=recipes) for p in phases]
    shared = [problem for problem in found[0] if all(problem in own for own in found)]
    return shared + [f"phases[{i}]: {p}" for i, own in enumerate(found) for p in own if p not in shared]


def phases_summary(phases: Sequence[Phase], architecture: Architecture, world_size: int) -> str:
    """The start-up arithmetic: first what all phases share, then the rest of each."""
    blocks = [
        _blocks(summary_lines(phase.recipe, architecture, world_size, phase.teacher or architecture))
        for phase in phases
    ]
    shared = [block for block in blocks[0] if all(block in own for own in blocks)]
    lines = [line for block in shared for line in block]
    if len(phases) > 1:
        for phase, own in zip(phases, blocks, strict=True):
            optimizer = phase.recipe.optimizer
            steps = f"steps {phase.steps_before + 1:,} to {phase.last_step:,}"
            lines.append((f"phase {phase.number}", f"{steps}, lr {optimizer.lr:g} {optimizer.schedule}"))
            for block in own:
                if block not in shared:
                    shown = block[:1] if block[0][0] == "memory a rank" else block  # its parts would be the most of it
                    lines += [(f"  {label}", text) for label, text in shown]
        lines.append(("tokens in all phases", f"{phases[-1].last_token:,} in {phases[-1].last_step:,} steps"))
    return in_columns(lines)


def _blocks(lines: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Each line with the indented ones below it."""
    blocks: list[list[tuple[str, str]]] = []
    for label, text in lines:
        if label.startswith(" "):
            blocks[-1].append((label, text))
        else:
            blocks.append([(label, text)])
    return blocks
