"""LongRoPE (Ding et al., arXiv 2402.13753)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from longred_megatron.rope.base import RopeMethod, RopeSource, scaled_twice_problems
from longred_megatron.settings import LARGEST_FLOAT, PositiveFloat

Factors = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1, max_length=4096)]


class LongRope(RopeMethod):
    """LongRoPE: a divisor for each frequency, found by a search; one set up to the original window, one above it.

    Which set a micro-batch takes: its largest position + 1 against the original window, as a forward call does in
    transformers. The search is not part of this project.
    """

    method: Literal["longrope"] = "longrope"
    short_factor: Factors = Field(
        description="divisors of the frequencies up to the original window, head_dim / 2 numbers, the fastest first"
    )
    long_factor: Factors = Field(description="the same above the original window")
    factor: Annotated[float, Field(ge=1, le=LARGEST_FLOAT)] | None = Field(
        None, description="what the attention factor is made from; left out: target window / original window"
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="scale of the rotary tables; left out: sqrt(1 + ln(factor) / ln(original window))"
    )

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        yield from scaled_twice_problems(self.method, where, source)
        for key in ("short_factor", "long_factor"):
            count, pairs = len(getattr(self, key)), source.head_dim // 2
            if count != pairs:
                yield (
                    f"`{where}.{key}` has {count} entries: must have {pairs}, one for each rotated pair of the "
                    f"{source.head_dim} dims of a head of model.hf"
                )
        if source.ratio <= 1:
            yield (
                f"`{where}.long_factor` has no effect: it is for more than the {source.original_window} positions of "
                f"model.hf, `model.max_position_embeddings` is {source.target_window}; raise it, or use rope: none"
            )
        if self.factor is not None and self.attention_factor is not None:
            yield (
                f"`{where}.factor` is {self.factor:g}: has no effect, since attention_factor is given; leave one of "
                "them out"
            )

    def extended(self, source: RopeSource) -> dict[str, Any]:
        attention = {} if self.attention_factor is None else {"attention_factor": self.attention_factor}
        return {
            **source.parameters,
            "rope_type": "longrope",
            "short_factor": list(self.short_factor),
            "long_factor": list(self.long_factor),
            "factor": self.factor or source.ratio,
            "original_max_position_embeddings": source.original_window,
            **attention,
        }
