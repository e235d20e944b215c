"""How much of a disk a run's teacher cache takes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.objectives.base import Tap
from longred_megatron.recipe import Phase

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def cache_bytes(phases: Sequence[Phase]) -> dict[Path, float]:
    """{folder: bytes}, if no text of the run comes twice and none is there yet."""
    found: dict[Path, float] = {}
    for phase in phases:
        steps, tokens = phase.recipe.training.steps, phase.recipe.step.tokens_per_microbatch
        for name, folder in phase.caches().items():
            count = steps * phase.recipe.objectives[name].microbatches * tokens
            found[folder] = found.get(folder, 0.0) + count * _token_bytes(phase, name)
    return found


def cache_lines(phases: Sequence[Phase]) -> list[str]:
    """For each folder, what it may take and what its disk has."""
    lines = []
    for folder, size in cache_bytes(phases).items():
        disk = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(disk).free
        short = "; what does not fit is not kept, and computed again by the next run" if size > free else ""
        lines.append(f"{folder}: at most {_size(size)}, {_size(free)} are free{short}")
    return lines


def _token_bytes(phase: Phase, name: str) -> float:
    teacher, needs, settings = phase.sites[name].teacher, phase.needs[name], phase.recipe.teacher_of(name)
    number = phase.recipe.precision.number_bytes if settings.cache_format == "exact" else 1
    scale = 0 if settings.cache_format == "exact" else 4

    def of(tap: Tap) -> float:
        if needs.teacher_entries and tap == needs.teacher_entries.tap:
            return needs.teacher_entries.token_bytes
        if tap.what in ("hidden", "attention_output"):
            return teacher.hidden_size * number + scale
        heads = teacher.num_attention_heads if tap.what == "query" else teacher.num_kv_heads
        return heads * (teacher.head_dim * number + scale)

    return sum(of(tap) for tap in needs.kept_taps(teacher.num_layers))


def _size(num_bytes: float) -> str:
    factor, unit = next((each for each in UNITS if num_bytes >= each[0]), UNITS[-1])
    return f"{num_bytes / factor:,.1f} {unit}"
