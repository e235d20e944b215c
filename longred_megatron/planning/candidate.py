"""A run in another layout than its recipe's: what it needs, how long it takes, and the settings that it changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from longred_megatron.layout import Parallel
from longred_megatron.planning.gpus import Gpu
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.plan import PhasePlan, plan_stages, stage_memories
from longred_megatron.recipe import Phase


@dataclass(frozen=True, eq=False)
class Candidate:
    """phases: of the run in this layout. What is asked for is computed once, since time costs more than memory."""

    phases: Sequence[Phase]
    world_size: int
    gpu: Gpu

    @cached_property
    def stages(self) -> list[list[StageMemory]]:
        """Of each phase, the memory of every pipeline stage."""
        return [stage_memories(phase, self.world_size) for phase in self.phases]

    @cached_property
    def stage_bytes(self) -> list[float]:
        """What a rank of each pipeline stage needs."""
        totals = ([stage.memory().peak.total for stage in own] for own in self.stages)
        return [max(each) + self.gpu.reserved_bytes for each in zip(*totals, strict=True)]

    @property
    def needed_bytes(self) -> float:
        """Of the fullest rank."""
        return max(self.stage_bytes)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.gpu.memory_bytes

    @cached_property
    def plans(self) -> list[PhasePlan]:
        """Of each phase."""
        return [plan_stages(own, self.world_size, self.gpu) for own in self.stages]

    @property
    def hours(self) -> float:
        return sum(plan.hours for plan in self.plans)

    @property
    def parallel(self) -> Parallel:
        return self.phases[0].recipe.parallel

    def changed(self, **sections: Mapping[str, Any]) -> "Candidate":
        """With other values of these sections of every phase's recipe."""
        phases = []
        for phase in self.phases:
            update = {name: getattr(phase.recipe, name).model_copy(update=own) for name, own in sections.items()}
            phases.append(replace(phase, recipe=phase.recipe.model_copy(update=update)))
        return replace(self, phases=phases)
