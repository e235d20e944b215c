"""Short-to-long distillation (LongReD, arXiv 2502.07365): skipped positions give the states of natural ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Generator

from longred_megatron.kernels import positions
from longred_megatron.kernels.cosine_distance import cosine_distance
from longred_megatron.objectives.base import Activations, Batch, Groups, Needs, Objective, Site, Tap, Term
from longred_megatron.objectives.shared import natural_batch, size_problems
from longred_megatron.settings import PositiveFloat


class ShortToLong(Objective):
    """Last hidden state at skipped positions against the teacher's at natural ones: 1 - cosine (L_s2l)."""

    kind: Literal["short_to_long"] = "short_to_long"
    weight: PositiveFloat = Field(description="factor of the loss in the step loss; LongReD's a2")
    positions: Literal["cream", "uniform", "natural"] = Field(
        description="how the student's positions spread over the target window"
    )

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        if site.target_window == site.original_window:
            yield (
                f"`{where}` has no effect: `model.max_position_embeddings` is {site.target_window}, which "
                "model.hf already has, so no position can be skipped; raise the window or remove the objective"
            )
        if self.positions != "natural" and self.sequence_length < positions.HEAD_FRACTION:
            least = positions.HEAD_FRACTION
            yield f"`{where}.sequence_length` is {self.sequence_length}: skipped positions need at least {least}"
        yield from size_problems(where, {"hidden_size": "hidden states", "vocab_size": "token ids"}, site)

    def needs(self, site: Site) -> Needs:
        # The last hidden state only (LongReD, section 3.3).
        return Needs(pairs={Tap(site.student.num_layers): Tap(site.teacher.num_layers)})

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        drawn = positions.draw(self.positions, len(samples), self.sequence_length, site.target_window, generator)
        return replace(natural_batch(samples), student_positions=drawn)

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        return [
            Term(cosine_distance(state, teacher.taps[tap]) / batch.num_valid_tokens, student.hidden_copies)
            for tap, state in student.taps.items()
        ]
