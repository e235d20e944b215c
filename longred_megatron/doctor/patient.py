"""What a check may know: the recipe, its small copy, and the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longred_megatron.device import on_gpu
from longred_megatron.doctor.team import Team
from longred_megatron.recipe import Phase, Recipe


@dataclass(frozen=True)
class Patient:
    """The recipe on these ranks.

    small: the recipe's small copy, by the number format that it computes in: fp32 on a CPU; on a GPU the recipe's
        parameters' own, and fp8 as well where the recipe computes in it.
    folder: of this rank alone. shared: on the disk of run.dir, one path for all ranks.
    """

    recipe: Recipe
    phases: Sequence[Phase]
    small: Mapping[str, Path]
    team: Team
    folder: Path
    shared: Path

    @property
    def main_format(self) -> str:
        """The number format that faults are looked for in; FP8 comes on top of it."""
        return next(iter(self.small))

    def untried_formats(self) -> dict[str, str]:
        """What the recipe computes in and this machine does not: the format, and why."""
        if on_gpu():
            return {}
        wanted: list[str] = [self.recipe.precision.params] if self.recipe.precision.params != "fp32" else []
        if any(phase.recipe.precision.fp8 for phase in self.phases):
            wanted.append("fp8")
        return dict.fromkeys(wanted, "no GPU is used: on the CPU everything is compared in fp32")
