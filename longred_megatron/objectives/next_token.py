"""Next-token cross-entropy on any texts: `long_text` of LongReD, and continued pre-training on the other sets."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Generator

from longred_megatron.data.sequences import DocumentSequences, IndexedSequences, Series
from longred_megatron.kernels import positions
from longred_megatron.kernels.cross_entropy import linear_cross_entropy, message_bytes, working_bytes
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.objectives.base import Activations, Batch, Groups, Needs, Objective, Site, Term
from longred_megatron.objectives.shared import masked_problems, texts


class NextToken(Objective):
    """Next-token cross-entropy (L_long of LongReD, Eq. 18, on long texts)."""

    kind: Literal["next_token", "long_text"] = "next_token"
    mask_documents: bool = Field(
        False, description="whether a text sees only itself; false: texts that share a sequence see those before them"
    )

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        return masked_problems(where, self.mask_documents, site)

    def needs(self, site: Site) -> Needs:
        return Needs(student_head=True)

    def masks_documents(self) -> bool:
        return self.mask_documents

    def series(self) -> Callable[[str, int, tuple[int, ...]], Series[Any]]:
        return DocumentSequences if self.mask_documents else IndexedSequences

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        documents = None
        if self.mask_documents:
            samples, lengths = zip(*samples, strict=True)
            documents = [_without_last(of_sequence) for of_sequence in lengths]
        tokens, labels = texts(samples)
        for row, of_sequence in enumerate(lengths if documents else ()):
            labels[row, positions.ends(of_sequence)[:-1]] = NO_LABEL  # the next token is another document's
        return Batch(
            tokens=tokens,
            labels=labels,
            student_positions=positions.natural(*tokens.shape),
            num_valid_tokens=max(1, int((labels != NO_LABEL).sum())),
            documents=documents,
        )

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        if student.head is None:
            return []
        loss = linear_cross_entropy(
            student.head.hidden,
            student.head.weight,
            batch.labels.reshape(-1),
            vocab_size=student.head.vocab_size,
            group=groups.tp if groups.tp.size() > 1 else None,
        )
        return [Term(loss / batch.num_valid_tokens, "each tensor rank")]

    def working_bytes(self, site: Site) -> float:
        return working_bytes(
            site.rank_tokens, site.student.vocab_size / site.parallel.tensor, site.precision.number_bytes
        )

    def message_bytes(self, site: Site) -> float:
        return message_bytes(site.rank_tokens, site.parallel.tensor)


def _without_last(lengths: Sequence[int]) -> list[int]:
    """The lengths of the documents of s + 1 tokens, of the first s."""
    return [*lengths[:-1], *([lengths[-1] - 1] if lengths[-1] > 1 else [])]
