"""Dynamic NTK (bloc97 and emozilla, 2023; described in YaRN's paper, arXiv 2309.00071, and as in transformers)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from longred_megatron.rope.base import RopeMethod, RopeSource, scaled_twice_problems
from longred_megatron.settings import LARGEST_FLOAT


class DynamicRope(RopeMethod):
    """Dynamic NTK: the base grows with the length at hand, and is the source's up to the original window.

    At a length L above the original window W the base is theta x (factor x L / W - (factor - 1))^(d / (d - 2)),
    d = head_dim; L = the largest position of the micro-batch + 1, or of the forward call in transformers.
    """

    method: Literal["dynamic"] = "dynamic"
    factor: Annotated[float, Field(ge=1, le=LARGEST_FLOAT)] | None = Field(
        None, description="how fast the base grows with the length; left out: target window / original window"
    )

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        yield from scaled_twice_problems(self.method, where, source)
        if source.ratio <= 1:
            yield (
                f"`{where}.method` is {self.method!r}: has no effect: the base grows past the "
                f"{source.original_window} positions of model.hf, `model.max_position_embeddings` is "
                f"{source.target_window}; raise it, or use rope: none"
            )

    def extended(self, source: RopeSource) -> dict[str, Any]:
        return {**source.parameters, "rope_type": "dynamic", "factor": self.factor or source.ratio}
