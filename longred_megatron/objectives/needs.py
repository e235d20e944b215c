"""What a loss needs of the models: places in them, and the teacher's likeliest next tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from longred_megatron.kernels import drawn_entries, top_entries

What = Literal["hidden", "query", "key", "value", "attention_output"]
"""What a model gives of a layer."""


class Tap(NamedTuple):
    """A place in a model. `layer`: from 1; the last layer's hidden state is the one after the final norm.

    query, key, value: of the layer's heads, after RoPE. attention_output: what the layer's attention adds to the
    hidden state. entries: of a teacher's last layer, [tokens, 1, ...] int32, see `kernels.top_entries.Entries.packed`.
    """

    layer: int
    what: What | Literal["entries"] = "hidden"


class HeadEntries(NamedTuple):
    """That of a teacher's head only a few entries are needed, out of the first `vocab_size`.

    layer: the teacher's last. number: how many, the likeliest; or, where `drawn`, drawn by the batch's `uniforms`.
    """

    layer: int
    number: int
    temperature: float
    vocab_size: int
    drawn: bool = False

    @property
    def token_bytes(self) -> int:
        """Of what is kept: the entries, and their log-probabilities with that of all others beside the likeliest."""
        return 4 * (2 * self.number + (not self.drawn))

    def choice_bytes(self, num_tokens: int, num_ranks: int) -> float:
        """Sent by each of the tensor ranks to find those of so many tokens."""
        if self.drawn:
            return drawn_entries.choice_bytes(num_tokens, self.number, num_ranks)
        return top_entries.choice_bytes(num_tokens, self.number, -(-self.vocab_size // num_ranks), num_ranks)

    @property
    def tap(self) -> Tap:
        """Under which they are kept."""
        return Tap(self.layer, "entries")


@dataclass(frozen=True)
class Needs:
    """What a loss needs of the models; everything else is not computed.

    pairs: {the student's tap: the teacher's that it is compared with}. The two must lie on one pipeline stage.
    student_head, teacher_head: final hidden states and the language-model head.
    teacher_entries: what is kept of the teacher's head's answer, instead of the hidden states.
    teacher_is_student: the teacher is the student itself, as it is in this step, without gradients.
    """

    pairs: Mapping[Tap, Tap] = field(default_factory=dict)
    student_head: bool = False
    teacher_head: bool = False
    teacher_entries: HeadEntries | None = None
    teacher_is_student: bool = False

    @property
    def teacher(self) -> bool:
        """Whether a teacher runs at all."""
        return bool(self.pairs) or self.teacher_head

    def teacher_taps(self, num_layers: int) -> set[Tap]:
        """All places of a teacher of `num_layers` layers whose values its pass gives."""
        return {*self.pairs.values()} | ({Tap(num_layers)} if self.teacher_head else set())

    def kept_taps(self, num_layers: int) -> set[Tap]:
        """All whose values wait for the loss."""
        if self.teacher_entries:
            return {*self.pairs.values(), self.teacher_entries.tap}
        return self.teacher_taps(num_layers)

    def teacher_depth(self, num_layers: int) -> int:
        """The last layer that a teacher of `num_layers` layers has to run; 0: none."""
        return max((tap.layer for tap in self.teacher_taps(num_layers)), default=0)
