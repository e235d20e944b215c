"""Fills a teacher cache without training: the teachers' passes over the micro-batches of a run, and nothing else."""

from collections.abc import Sequence
from contextlib import closing

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.recipe import Phase
from longred_megatron.training.microbatches import MicroBatchSource, local_part
from longred_megatron.training.run import build_teachers
from longred_megatron.training.teachers import Teachers


def check_cache(phases: Sequence[Phase], steps: range | None) -> range:
    """The steps to fill, by default all of the run's.

    Raises UserError when no objective has a cache, and for steps that the run does not have.
    """
    if not any(phase.caches() for phase in phases):
        raise UserError("no objective has a teacher with a cache; set teacher.cache=FOLDER")
    every = range(1, phases[-1].last_step + 1)
    if steps is None:
        return every
    if not steps or steps[0] not in every or steps[-1] not in every:
        raise UserError(f"--steps {steps.start}-{steps.stop - 1}: the run has the steps 1-{every[-1]}")
    return steps


def fill(
    phases: Sequence[Phase], data: Sequence[MicroBatchSource], groups: ProcessGroupCollection, steps: range
) -> tuple[int, int]:
    """Keeps what the teachers say in these steps. Returns of how many micro-batches it was there, and of how many not.

    Of this replica; what is there and whole is not computed again.

    Raises UserError when a rank cannot write.
    """
    there = asked = 0
    is_main = torch.distributed.get_rank() == 0
    with tqdm(total=len(steps), desc="filling", unit=" steps", disable=None if is_main else True) as progress:
        for phase, source in zip(phases, data, strict=True):
            own = [step for step in steps if phase.steps_before < step <= phase.last_step]
            if not own or not phase.caches():
                progress.update(len(own))
                continue
            with closing(build_teachers(phase, (), groups)) as teachers:
                for step in own:
                    microbatches = source.step(step, groups.dp.rank(), groups.dp.size())
                    kept = [m for m in teachers.cache.read(microbatches) if m.keys is not None]
                    for microbatch in kept:
                        asked, there = asked + (microbatch.cached is None), there + (microbatch.cached is not None)
                    local = [local_part(m, groups) for m in kept]
                    targets = teachers.begin_step(local)
                    for microbatch, values in zip(local, targets, strict=True):
                        teachers.finish(microbatch, values)
                        values.clear()
                    _check_written(teachers)
                    progress.update()
            _check_written(teachers)
    return there, asked


def _check_written(teachers: Teachers) -> None:
    if why := teachers.cache.why_unwritten():
        raise UserError(f"{why}; free space and start again: what is there is not computed again")
