"""Restoration of short texts (LongReD, arXiv 2502.07365): hidden states keep the direction of the teacher's."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Generator

from longred_megatron.kernels.cosine_distance import cosine_distance
from longred_megatron.objectives.base import Activations, Batch, Groups, Layers, Needs, Objective, Site, Tap, Term
from longred_megatron.objectives.shared import natural_batch, size_problems
from longred_megatron.settings import PositiveFloat


class ShortRestoration(Objective):
    """Hidden states of chosen layers against the teacher's on short texts: sum over layers of 1 - cosine (L_short)."""

    kind: Literal["short_restoration"] = "short_restoration"
    weight: PositiveFloat = Field(description="factor of the loss in the step loss; LongReD's a1")
    layers: Layers = Field(
        description="restored layers numbered as in Hugging Face hidden_states: 1 is the first layer's output"
    )
    states: Literal["hidden", "attention_output"] = Field(
        "hidden", description="what is restored of a layer: its output, as in LongReD, or its attention's output"
    )

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        compared = {"hidden_size": "hidden states", "vocab_size": "token ids", "num_layers": "layers"}
        return size_problems(where, compared, site)

    def needs(self, site: Site) -> Needs:
        return Needs(pairs={Tap(k, self.states): Tap(k, self.states) for k in self.layers})

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        return natural_batch(samples)

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        return [
            Term(
                cosine_distance(state, teacher.taps[tap]) / batch.num_valid_tokens,
                student.hidden_copies,
                f"layer_{tap.layer}",
            )
            for tap, state in student.taps.items()
        ]
