"""The terms of the loss that one model chunk owes for one micro-batch."""

from collections.abc import Mapping
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from longred_megatron.kernels.drawn_entries import linear_drawn_entries
from longred_megatron.kernels.top_entries import Entries, linear_top_entries
from longred_megatron.model.chunk import ModelChunk
from longred_megatron.objectives.base import Activations, Copies, Head, HeadEntries, Needs, Tap, Term
from longred_megatron.training.microbatches import MicroBatch


def chunk_terms(
    chunk: ModelChunk,
    teacher: ModelChunk | None,
    microbatch: MicroBatch,
    needs: Needs,
    output: Tensor,
    values: Mapping[Tap, Tensor],
    targets: Mapping[Tap, Tensor],
    groups: ProcessGroupCollection,
) -> list[Term]:
    """The terms of the micro-batch's objective in this chunk, without the objective's weight.

    Args:
        teacher: its last chunk on this rank, if there is a teacher; it may be `chunk` itself.
        output: [tokens, 1, hidden] from the chunk.
        values: the student's, by its taps. targets: the teacher's, by the teacher's taps.
    """
    copies: Copies = "split over tensor ranks" if chunk.config.sequence_parallel else "each tensor rank"
    own_head, their_head, few = None, None, None
    if chunk.post_process and needs.student_head:
        own_head = head(chunk, output, groups)
    if chunk.post_process and needs.teacher_entries:
        kept = needs.teacher_entries
        few = Entries.unpacked(targets[kept.tap].squeeze(1), kept.number, kept.vocab_size)
    elif chunk.post_process and needs.teacher_head:
        assert teacher is not None
        their_head = head(teacher, targets[Tap(teacher.architecture.num_layers)], groups)
    student = Activations(values, own_head, copies)
    theirs = Activations({tap: targets[needs.pairs[tap]] for tap in values}, their_head, copies, few)
    return microbatch.settings.loss(student, theirs, microbatch, groups)


def head_entries(
    chunk: ModelChunk, output: Tensor, few: HeadEntries, uniforms: Tensor | None, groups: ProcessGroupCollection
) -> Tensor:
    """What is kept of a teacher's last chunk's output [tokens, 1, hidden]: `Entries.packed` [tokens, 1, ...].

    All tokens on every tensor rank. uniforms: of these tokens, where entries are drawn.
    """
    own = head(chunk, output, groups)
    settings: dict[str, Any] = {
        "vocab_size": few.vocab_size,
        "temperature": few.temperature,
        "group": groups.tp if groups.tp.size() > 1 else None,
    }
    if few.drawn:
        assert uniforms is not None
        found = linear_drawn_entries(own.hidden, own.weight, uniforms.flatten(0, 1), **settings)
    else:
        found = linear_top_entries(own.hidden, own.weight, few.number, **settings)
    return found.packed().unsqueeze(1)


def head(chunk: ModelChunk, output: Tensor, groups: ProcessGroupCollection) -> Head:
    """All tokens on every tensor rank, for its part of the vocabulary; backward sums the gradient's parts."""
    if chunk.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=True, group=groups.tp)
    else:
        hidden = copy_to_tensor_model_parallel_region(output, group=groups.tp)
    weight = chunk.head_weight()
    # A teacher's hidden states come without a graph, and so does its head: it may be the student's own.
    return Head(hidden.squeeze(1), weight if output.requires_grad else weight.detach(), chunk.architecture.vocab_size)
