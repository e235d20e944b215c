"""What an objective is: its recipe keys, its checks, what it needs of the models, its micro-batches and its loss.

An objective is one class in one file of this folder, and a file put here is an objective: the recipe, the training
step, the start-up arithmetic, the metrics and the rehearsal ask the class and do not know its name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Generator, Tensor

from longred_megatron.data.sequences import IndexedSequences, Series
from longred_megatron.errors import listed, multiples
from longred_megatron.families import Architecture
from longred_megatron.kernels.top_entries import Entries
from longred_megatron.layout import Parallel
from longred_megatron.objectives.layers import Layers as Layers
from longred_megatron.objectives.layers import layer_problems
from longred_megatron.objectives.needs import HeadEntries as HeadEntries
from longred_megatron.objectives.needs import Needs as Needs
from longred_megatron.objectives.needs import Tap as Tap
from longred_megatron.precision import Precision
from longred_megatron.settings import (
    Mark,
    NumTokens,
    PositiveFloat,
    PositiveInt,
    RecipePath,
    Settings,
    marked_fields,
    renamed,
)

MAX_MICROBATCHES = 100_000  # what is above is a slip, and its first step would never end


@dataclass(frozen=True)
class Site:
    """What an objective may know of the run it is in; never the whole recipe.

    student: as released, with its own window and RoPE. teacher: the objective's; where the student is its own, that.
    Windows are in tokens.
    """

    student: Architecture
    teacher: Architecture
    target_window: int
    tokens_per_microbatch: int
    parallel: Parallel
    precision: Precision

    @property
    def original_window(self) -> int:
        return self.student.max_position_embeddings

    @property
    def shared_vocab_size(self) -> int:
        """Entries that student and teacher have: of one tokenizer, but released models pad it to different sizes."""
        return min(self.student.vocab_size, self.teacher.vocab_size)

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch on one context rank."""
        return self.tokens_per_microbatch // self.parallel.context


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n sequences of s tokens."""

    tokens: Tensor  # [n, s] int64
    labels: Tensor  # [n, s] int64: the next token; -100 where no loss asks for it
    student_positions: Tensor  # [n, s] int64
    teacher_positions: Tensor | None = None  # [n, s] int64; None where there is no teacher
    num_valid_tokens: int  # N_i of the step loss: the tokens that the loss is averaged over
    documents: Sequence[Sequence[int]] | None = None  # their lengths in each sequence, where each sees only itself
    uniforms: Tensor | None = None  # [n, s, draws] in [0, 1), where entries of the teacher's vocabulary are drawn


@dataclass(frozen=True)
class Head:
    """Final hidden states [tokens, hidden] of all tokens of this context rank, and this tensor rank's rows of the head.

    weight: [padded vocabulary / tensor, hidden]. vocab_size: of the whole head, without padding for the tensor ranks.
    """

    hidden: Tensor
    weight: Tensor
    vocab_size: int


Copies = Literal["each tensor rank", "split over tensor ranks"]


@dataclass(frozen=True)
class Activations:
    """What this rank has of one micro-batch in one model chunk.

    taps: those of the student's that lie in the chunk, also for the teacher's values. Hidden states and attention
    outputs: [tokens, 1, hidden], the context rank's tokens, split over the tensor ranks under sequence parallelism.
    query, key, value: [tokens, 1, heads / tensor, head_dim], all of the context rank's tokens.
    head, entries: on the last chunk, where it is needed.
    hidden_copies: whether each tensor rank has all tokens of a hidden state.
    """

    taps: Mapping[Tap, Tensor]
    head: Head | None
    hidden_copies: Copies
    entries: Entries | None = None


class Term(NamedTuple):
    """A part of a micro-batch's loss.

    share: scalar; this rank's part of (1/N) * sum over the micro-batch's N valid tokens, without the objective's
    weight. Shares are summed over context ranks and pipeline stages; over tensor ranks where it is split over them, as
    `copies` says, and not where each of them holds the same.
    name: of a metric `loss/<objective>/<name>`; None: part of `loss/<objective>` alone.
    """

    share: Tensor
    copies: Copies
    name: str | None = None


class Groups(Protocol):
    """The process groups of this rank that a loss may talk over: tensor-parallel and context-parallel."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup


class Teacher(Settings):
    """The frozen model that the student is compared with; it keeps its own RoPE."""

    hf: RecipePath = Field(description="Hugging Face folder of the teacher; left out: model.hf")
    cache: Annotated[RecipePath | None, Mark.FREE, Mark.OUTPUT] = Field(
        None,
        description="folder, on a disk that all ranks share, where what the teacher says of a text is kept and read "
        "again, by any later layout, order of data or run; null: the teacher runs every time",
    )
    cache_format: Literal["exact", "fp8"] = Field(
        "exact", description="of the kept hidden states; fp8: E4M3 with a scale for each token, half the bytes of bf16"
    )


class Objective(Settings):
    """What all objectives have in common. A kind adds `kind: Literal["its_name"] = "its_name"` and its own keys."""

    if TYPE_CHECKING:
        kind: str

    microbatches: Annotated[PositiveInt, Field(le=MAX_MICROBATCHES)] = Field(
        description="micro-batches of this objective per optimizer step, over all data-parallel replicas"
    )
    sequence_length: NumTokens = Field(description="tokens of one sequence")
    data: str = Field(description="name of a data set of the section `data`")
    weight: PositiveFloat = Field(1.0, description="factor of this objective's loss in the step loss")
    whole_sequences: bool = Field(
        False,
        description="whether each context rank holds whole sequences; false: parallel.context ranks share each",
    )
    teacher: Teacher | None = Field(None, description="a teacher of its own; left out: the recipe's")
    context_parallel: PositiveInt | None = Field(
        None, exclude=True, description="the old name of whole_sequences: 1 is true, parallel.context is false"
    )

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: Any) -> Any:
        new = renamed(values, "context_parallel", "whole_sequences", lambda ranks: ranks == 1)
        # Kept for `_cut_problems`, which knows parallel.context.
        return new | {"context_parallel": values["context_parallel"]} if new is not values else values

    @staticmethod
    def in_new_names(changes: Any) -> Any:
        """What a phase changes in an objective, which may be written with old names, over one with the new ones."""
        if not isinstance(changes, dict) or "context_parallel" not in changes or "whole_sequences" in changes:
            return changes
        ranks, rest = changes["context_parallel"], {k: v for k, v in changes.items() if k != "context_parallel"}
        fits = ranks is None or (type(ranks) is int and ranks > 0)
        return rest | {"whole_sequences": ranks == 1} if fits else changes  # null: false again

    # What a kind states.

    def needs(self, site: Site) -> Needs:
        """What its loss needs of student and teacher."""
        raise NotImplementedError

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        """A micro-batch of the samples of `series`, as many as sequences go into it. Random numbers: `generator`'s."""
        raise NotImplementedError

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        """The terms that this rank owes for the micro-batch in one model chunk; none where it needs nothing of it.

        teacher: its values under the student's taps. batch: this context rank's part, `num_valid_tokens` of the whole.
        """
        raise NotImplementedError

    def series(self) -> Callable[[str, int, tuple[int, ...]], Series[Any]]:
        """Where its samples come from: makes the endless series of one data set from (prefix, length, seed)."""
        return IndexedSequences

    def masks_documents(self) -> bool:
        """Whether its batches name the documents of a sequence, which do not see each other."""
        return False

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        """What only this kind knows to be wrong, each a sentence; `where` is its key's path."""
        return iter(())

    def working_bytes(self, site: Site) -> float:
        """Memory of its loss on one rank, beside the activations."""
        return 0.0

    def message_bytes(self, site: Site) -> float:
        """Sent by a tensor rank for a micro-batch's loss, beside what layers and heads send."""
        return 0.0

    def own_flops(self, site: Site) -> float:
        """Floating-point operations of a micro-batch's loss, forward and backward, beside layers and heads."""
        return 0.0

    # What follows from it.

    def problems(self, where: str, site: Site) -> Iterator[str]:
        """Everything wrong with it at this place, each a sentence: key, value, rule and what to change."""
        needs = self.needs(site)
        yield from self._length_problems(where, needs, site)
        yield from self._cut_problems(where, site)
        yield from self.own_problems(where, site)
        yield from self._layer_problems(where, needs, site)
        if needs.teacher_is_student and site.precision.scaling == "delayed":
            yield (
                f"`{where}` runs the student without gradients before it trains: with delayed scaling that pass casts "
                "with scales that no step has set; set `precision.fp8_recipe` to tensorwise, or `precision.fp8` to null"
            )
        if self.teacher is not None and (not needs.teacher or needs.teacher_is_student):
            what = "the student is its own" if needs.teacher else "it compares with none"
            yield f"`{where}.teacher` has no effect: {what}; remove it"

    def _length_problems(self, where: str, needs: Needs, site: Site) -> Iterator[str]:
        path, length, tokens = f"`{where}.sequence_length`", self.sequence_length, site.tokens_per_microbatch
        if length > site.target_window:
            yield (
                f"{path} is {length}: longer than the target window, `model.max_position_embeddings` "
                f"{site.target_window}; use {site.target_window} or less, or raise the window"
            )
        elif needs.teacher and not needs.teacher_is_student and length > site.teacher.max_position_embeddings:
            window = site.teacher.max_position_embeddings
            yield (
                f"{path} is {length}: longer than the teacher's window of {window} "
                f"tokens, past which it is no guide; use {window} or less"
            )
        if tokens % length:
            yield (
                f"`step.tokens_per_microbatch` is {tokens}: must be a multiple of {path} {length}; "
                f"nearest: {multiples(tokens, length)}"
            )

    def _cut_problems(self, where: str, site: Site) -> Iterator[str]:
        """Whether context parallelism can cut its micro-batches."""
        context, length, tokens = site.parallel.context, self.sequence_length, site.tokens_per_microbatch
        if self.context_parallel not in (None, 1, context):
            allowed = "1" if context == 1 else f"1 or `parallel.context` {context}"
            yield f"`{where}.context_parallel` is {self.context_parallel}: must be {allowed}"
        elif context == 1:
            return
        elif not self.whole_sequences and length % (2 * context):
            yield (
                f"`{where}.sequence_length` is {length}: must be a multiple of 2 x `parallel.context` = "
                f"{2 * context}, as each rank takes two equal pieces; nearest: "
                f"{multiples(length, 2 * context)}, or set whole_sequences: true"
            )
        elif self.whole_sequences and tokens % length == 0 and tokens // length % context:
            yield (
                f"`{where}.whole_sequences` is true: the {tokens // length} sequences of a micro-batch must be "
                f"a multiple of `parallel.context` {context}; set `step.tokens_per_microbatch` to a "
                f"multiple of {length * context} (nearest: {multiples(tokens, length * context)}) or leave "
                "whole_sequences out"
            )

    def _layer_problems(self, where: str, needs: Needs, site: Site) -> Iterator[str]:
        """Whether student and teacher have the layers that are needed, and both values lie on one pipeline stage."""
        told: set[int] = set()  # by the keys that name them
        for key in marked_fields(type(self), Mark.LAYERS):
            layers = getattr(self, key) or ()
            told |= {layer for layer in layers if not 1 <= layer <= site.student.num_layers}
            yield from layer_problems(f"{where}.{key}", layers, site.student)
        sides = (("model.hf", site.student, list(needs.pairs)), ("its teacher", site.teacher, [*needs.pairs.values()]))
        for whose, model, taps in sides:
            outside = sorted({tap.layer for tap in taps if not 1 <= tap.layer <= model.num_layers} - told)
            if outside:
                yield f"`{where}` needs the layers {listed(outside)} of {whose}, which has 1 to {model.num_layers}"
        ours, theirs = (
            site.parallel.for_depth(m.num_layers).layer_stages(m.num_layers) for m in (site.student, site.teacher)
        )
        for a, b in needs.pairs.items():
            stages = ours.get(a.layer), theirs.get(b.layer)
            if None not in stages and stages[0] != stages[1]:
                yield (
                    f"`{where}` compares layer {a.layer} of model.hf with layer {b.layer} of its teacher: they lie on "
                    f"the pipeline stages {stages[0]} and {stages[1]} (from 0) and must lie on one; change `parallel`"
                )
                return
