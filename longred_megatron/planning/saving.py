"""Bytes of a checkpoint and an export on a rank.

A checkpoint is written from where the state lies, without a copy on the device; with `training.async_save` from a copy
in the machine's memory.
"""

from collections.abc import Sequence

from longred_megatron.planning.parameters import ChunkModel, elements, stage_chunks
from longred_megatron.recipe import Phase


def checkpoint_bytes(phase: Phase, world_size: int) -> float:
    """What the fullest rank writes of a checkpoint: (b * N + 12 * trained N) / (dp * cp).

    b: bytes of a number. N: of the fullest stage. 12: an fp32 copy of each trained parameter, whatever its own type,
    and Adam's two moments.
    """
    p, precision, trainable = phase.recipe.parallel, phase.recipe.precision, phase.recipe.training.trainable
    stages = [stage_chunks(phase.source, p, stage) for stage in range(p.pipeline)]
    whole = max(precision.number_bytes * elements(own) + 12 * elements(own, trainable) for own in stages)
    return whole / (world_size // (p.tensor * p.pipeline))


def export_bytes(chunks: Sequence[ChunkModel], tensor: int, number_bytes: int) -> float:
    """On the device of a tensor rank 0, beside all that training holds: the largest parameter, of all tensor ranks."""
    largest = max((parameter.elements for chunk in chunks for parameter in chunk.parameters), default=0)
    return float(tensor * number_bytes * largest)
