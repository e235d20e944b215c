"""What a comparison is: two sides that do the same work, each in processes of its own, and the settings they do it at.

A comparison is one class in one file of this folder, and a file put here is one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from longred_megatron.settings import NumTokens, PositiveInt, Settings

Facts = dict[str, float]
"""What a side computed, by name: both have to come to the same."""


class Sizes(Settings):
    """How large everything is. The defaults: SmolLM2-135M's shapes, LongReD's mix of a step."""

    layers: PositiveInt = Field(30, description="of the LongReD step's models")
    twin_layers: PositiveInt = Field(8, description="of the models of all other comparisons")
    hidden_size: PositiveInt = 576
    intermediate_size: PositiveInt = 1536
    heads: PositiveInt = 9
    kv_heads: PositiveInt = 3
    vocabulary: PositiveInt = 49_152
    sequence_length: NumTokens = Field(2048, description="tokens of a micro-batch, and the target window")
    microbatches: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)] = Field(
        (8, 2, 6), description="of long_text, short_to_long and short_restoration in a step"
    )
    twin_microbatches: PositiveInt = Field(2, description="of a step of all other comparisons")
    ranks: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = Field((2, 4), description="of `scaling`")
    text_bytes: PositiveInt = Field(20_000_000, description="of text that is prepared")
    prompts: PositiveInt = Field(8, description="that are answered, and windows whose loss is measured")
    matrix_size: PositiveInt = Field(4096, description="of the product that measures the peak; twice that on a GPU")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        problems = {
            "heads": self.hidden_size % (2 * self.heads) and "hidden_size must be an even multiple of it",
            "kv_heads": self.heads % self.kv_heads and "heads must be a multiple of it",
            "sequence_length": self.sequence_length % 64
            and "must be a multiple of 64: the shortest texts are an eighth",
        }
        if found := [f"{key}={getattr(self, key)}: {problem}" for key, problem in problems.items() if problem]:
            raise ValueError("; ".join(found))
        return self


QUICK = Sizes(
    layers=4,
    twin_layers=4,
    hidden_size=64,
    intermediate_size=128,
    heads=4,
    kv_heads=2,
    vocabulary=512,
    sequence_length=128,
    microbatches=(2, 1, 1),
    text_bytes=200_000,
    prompts=4,
    matrix_size=512,
)


class Side(ABC):
    """One way to do the work. Built in a process of its own, which then does it once a repeat."""

    def before(self) -> None:  # noqa: B027 (nothing to do is the usual case)
        """Before each repeat; not timed."""

    @abstractmethod
    def once(self) -> None:
        """The work of a repeat. It need not wait for the device."""

    def facts(self) -> Facts:
        """What the last repeat computed; not timed."""
        return {}


Start = Callable[[], Side]
"""Builds a side in its process: picklable, a `partial` of a class."""


@dataclass(frozen=True)
class Case:
    """A setting at which both sides do the same work.

    work: of our repeat, in `unit`. flops: that the model needs for it; None where products are not what it is made of.
    reference_work, reference_flops: None: the same. dtype: of these products. tolerance: relative, of the facts that
    both sides have after their first repeat. ours_ranks: processes of our side; the reference has one.
    """

    setting: str
    ours: Start
    reference: Start
    work: float
    unit: str
    flops: float | None = None
    dtype: str = "fp32"
    tolerance: float = 1e-4
    ours_ranks: int = 1
    reference_work: float | None = None
    reference_flops: float | None = None


class Comparison(ABC):
    """Cases that belong together. Its name is its file's; its docstring says what is compared with what."""

    name: ClassVar[str]

    @abstractmethod
    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        """folder: an empty one for its inputs, there until the last case is done."""


TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Of losses: sums in another order, or other places that round to 8 bits."""


def formats() -> tuple[str, ...]:
    """The number formats in which models are compared here: that of training on a GPU, on a CPU those that are fast."""
    from longred_megatron.device import bf16_is_slow, on_gpu

    if on_gpu():
        return ("bf16",)
    return ("fp32",) if bf16_is_slow() else ("fp32", "bf16")
