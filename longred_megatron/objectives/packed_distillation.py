"""Logit distillation from packed short samples (arXiv 2604.06070): the next tokens of a long-context teacher."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator

from longred_megatron.data.packing import Pack, PackedSequences
from longred_megatron.data.sequences import Series
from longred_megatron.kernels import cross_entropy, divergence, drawn_entries, positions, top_entries
from longred_megatron.kernels.cross_entropy import linear_cross_entropy
from longred_megatron.kernels.divergence import Direction, linear_distillation
from longred_megatron.kernels.drawn_entries import linear_drawn_distillation
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.kernels.top_entries import linear_top_distillation
from longred_megatron.objectives.base import Activations, Batch, Groups, HeadEntries, Needs, Objective, Site, Term
from longred_megatron.objectives.shared import masked_problems
from longred_megatron.settings import Mark, PositiveInt


class PackedDistillation(Objective):
    """Next-token distributions against a long-context teacher's, on short texts packed into a long window.

    The token's loss is (1 - cross_entropy) x temperature^2 x divergence + cross_entropy x next-token cross-entropy.
    """

    kind: Literal["packed_distillation"] = "packed_distillation"
    direction: Direction = Field(
        "forward", description="of the divergence; forward: KL(teacher || student), as in arXiv 2511.06719"
    )
    temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0, description="divisor of both models' logits in the divergence"
    )
    top_k: Annotated[PositiveInt, Mark.ENTRIES] | None = Field(
        None, description="the teacher's k likeliest tokens, and one bucket for all others; null: every token"
    )
    draws: Annotated[PositiveInt, Mark.ENTRIES] | None = Field(
        None, description="so many tokens drawn from the teacher's distribution stand for it; null: it is needed itself"
    )
    cross_entropy: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of next-token cross-entropy in the loss; 1: no teacher"
    )
    mask_documents: bool = Field(False, description="whether a text of the pack sees only itself")
    restart_positions: bool = Field(
        False, description="whether each text's positions start at 0; false: they run on through the pack"
    )

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        if self.top_k is not None and self.top_k >= site.student.vocab_size:
            yield (
                f"`{where}.top_k` is {self.top_k}: has no effect, model.hf has {site.student.vocab_size} tokens; "
                "leave it out, or use less"
            )
        if self.cross_entropy == 1:
            for key in ("direction", "temperature", "top_k", "draws"):
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    yield (
                        f"`{where}.{key}` is {value}: has no effect, since cross_entropy is 1 and no teacher is "
                        "compared with; leave it out, or lower cross_entropy"
                    )
        if self.draws is not None and self.top_k is not None:
            yield f"`{where}` has top_k and draws, two ways to need less of the teacher; set one of them to null"
        if self.draws is not None and self.direction != "forward":
            yield f"`{where}.direction` is {self.direction!r}: tokens drawn from the teacher estimate forward alone"
        yield from masked_problems(where, self.mask_documents, site)

    def needs(self, site: Site) -> Needs:
        if self.cross_entropy == 1:
            return Needs(student_head=True)
        entries = None
        if count := self.top_k or self.draws:
            last, drawn = site.teacher.num_layers, self.draws is not None
            entries = HeadEntries(last, count, self.temperature, site.shared_vocab_size, drawn)
        return Needs(student_head=True, teacher_head=True, teacher_entries=entries)

    def masks_documents(self) -> bool:
        return self.mask_documents

    def series(self) -> Callable[[str, int, tuple[int, ...]], Series[Pack]]:
        return PackedSequences

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        """A document's last token asks for no next one, nor does padding, which counts as one more document."""
        tokens = torch.from_numpy(np.stack([pack.tokens for pack in samples]))
        documents = [[*pack.lengths, length] if (length := pack.num_padding) else pack.lengths for pack in samples]
        labels = tokens.roll(-1, dims=1)
        position_ids = positions.natural(*tokens.shape)
        for row, (pack, lengths) in enumerate(zip(samples, documents, strict=True)):
            labels[row, positions.ends(pack.lengths)] = NO_LABEL
            labels[row, len(pack.tokens) - pack.num_padding :] = NO_LABEL
            if self.restart_positions:
                position_ids[row] = torch.cat([torch.arange(length) for length in lengths])
        return Batch(
            tokens=tokens,
            labels=labels,
            student_positions=position_ids,
            teacher_positions=position_ids if self.cross_entropy < 1 else None,
            num_valid_tokens=max(1, int((labels != NO_LABEL).sum())),
            documents=documents if self.mask_documents else None,
            uniforms=None if self.draws is None else torch.rand(*tokens.shape, self.draws, generator=generator),
        )

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        if student.head is None:
            return []
        ours, theirs, entries = student.head, teacher.head, teacher.entries
        labels, group = batch.labels.reshape(-1), groups.tp if groups.tp.size() > 1 else None
        own = (ours.hidden, ours.weight)
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "cross_entropy": self.cross_entropy,
            "group": group,
        }
        if entries is not None and self.draws:
            loss = linear_drawn_distillation(*own, entries, labels, **settings)
        elif entries is not None:
            loss = linear_top_distillation(*own, entries, labels, direction=self.direction, **settings)
        elif theirs is not None:
            # One tokenizer, but released models pad their vocabularies to different sizes.
            vocab_size = min(ours.vocab_size, theirs.vocab_size)
            settings |= {"vocab_size": vocab_size, "direction": self.direction}
            loss = linear_distillation(*own, theirs.hidden, theirs.weight, labels, **settings)
        else:
            loss = linear_cross_entropy(*own, labels, vocab_size=ours.vocab_size, group=group)
        return [Term(loss / batch.num_valid_tokens, "each tensor rank")]

    def working_bytes(self, site: Site) -> float:
        tokens, entries = site.rank_tokens, site.student.vocab_size / site.parallel.tensor
        size = site.precision.number_bytes
        if self.cross_entropy == 1:
            return cross_entropy.working_bytes(tokens, entries, size)
        # With cross-entropy, its gradient by the logits waits for the divergence's.
        labels = cross_entropy.working_bytes(tokens, entries, 4) * size / 4 if self.cross_entropy else 0.0
        return divergence.working_bytes(tokens, entries, size) + labels

    def message_bytes(self, site: Site) -> float:
        tokens, ranks = site.rank_tokens, site.parallel.tensor
        labels = cross_entropy.message_bytes(tokens, ranks) if self.cross_entropy else 0.0
        if self.cross_entropy == 1:
            return labels
        if self.draws:
            return labels + drawn_entries.message_bytes(tokens, self.draws, ranks)
        if self.top_k:
            return labels + top_entries.message_bytes(tokens, self.top_k, ranks)
        return labels + divergence.message_bytes(tokens, ranks)
