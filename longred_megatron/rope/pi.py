"""Position interpolation (Chen et al., arXiv 2306.15595)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from longred_megatron.rope.base import RopeMethod, RopeSource, factor_problems, scaled_twice_problems


class PiRope(RopeMethod):
    """Position interpolation: every position is divided by the factor."""

    method: Literal["pi"] = "pi"
    factor: Annotated[float, Field(gt=1)] | None = Field(
        None, description="divisor of the positions; left out: target window / original window"
    )

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        yield from scaled_twice_problems(self.method, where, source)
        yield from factor_problems(self.factor, where, source)

    def extended(self, source: RopeSource) -> dict[str, Any]:
        return {**source.parameters, "rope_type": "linear", "factor": self.factor or source.ratio}
