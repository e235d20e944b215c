"""RoPE-Perturbed Self-Distillation (arXiv 2604.14339): a text reads the same at perturbed position ids."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Generator

from longred_megatron.kernels import divergence, positions
from longred_megatron.kernels.divergence import linear_distillation
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.objectives.base import Activations, Batch, Groups, Needs, Objective, Site, Term
from longred_megatron.objectives.shared import texts
from longred_megatron.settings import NumTokens


class PerturbedPositions(Objective):
    """Next-token distributions at perturbed position ids against the student's own at natural ones.

    The token's loss is KL(perturbed || natural), the natural side without a gradient, over the tokens that see others
    at changed distances.
    """

    kind: Literal["perturbed_positions"] = "perturbed_positions"
    variant: Literal["skip", "cyclic"] = Field(
        "skip",
        description="skip: ids jump ahead once, at a random token; cyclic: all ids are shifted, modulo the length",
    )
    longest_skip: NumTokens | None = Field(
        None, description="of the variant skip, in tokens; left out: sequence_length, as in the paper"
    )

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        if self.variant == "cyclic" and self.longest_skip is not None:
            yield f"`{where}.longest_skip` is {self.longest_skip}: has no effect with variant cyclic; leave it out"
        if self.sequence_length < 2:
            yield f"`{where}.sequence_length` is {self.sequence_length}: a text needs at least 2 tokens to be perturbed"

    def needs(self, site: Site) -> Needs:
        return Needs(student_head=True, teacher_head=True, teacher_is_student=True)

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        tokens, labels = texts(samples)
        size = len(tokens), self.sequence_length
        if self.variant == "skip":
            perturbed, first = positions.skip(*size, self.longest_skip or self.sequence_length, generator)
        else:
            perturbed, first = positions.cyclic(*size, generator)
        natural = positions.natural(*size)
        labels[natural < first[:, None]] = NO_LABEL
        return Batch(
            tokens=tokens,
            labels=labels,
            student_positions=perturbed,
            teacher_positions=natural,
            num_valid_tokens=int((labels != NO_LABEL).sum()),
        )

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        if student.head is None or teacher.head is None:
            return []
        loss = linear_distillation(
            student.head.hidden,
            student.head.weight,
            teacher.head.hidden,
            teacher.head.weight,
            batch.labels.reshape(-1),
            vocab_size=student.head.vocab_size,
            direction="reverse",  # KL(student || teacher), the teacher being the natural view
            group=groups.tp if groups.tp.size() > 1 else None,
        )
        return [Term(loss / batch.num_valid_tokens, "each tensor rank")]

    def working_bytes(self, site: Site) -> float:
        return divergence.working_bytes(
            site.rank_tokens, site.student.vocab_size / site.parallel.tensor, site.precision.number_bytes
        )

    def message_bytes(self, site: Site) -> float:
        return divergence.message_bytes(site.rank_tokens, site.parallel.tensor)
