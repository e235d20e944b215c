"""Adjusted base frequency (Xiong et al., arXiv 2309.16039)."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from longred_megatron.rope.base import RopeMethod, RopeSource
from longred_megatron.settings import PositiveFloat


class AbfRope(RopeMethod):
    """Adjusted base frequency: only RoPE's base grows; nothing else of the source's RoPE changes."""

    method: Literal["abf"] = "abf"
    theta: PositiveFloat = Field(description="RoPE base of the longer window, e.g. 2.0e7 for 32K from 8K")

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        theta = source.parameters["rope_theta"]
        if self.theta <= theta:
            effect = "has no effect: it is" if self.theta == theta else "is below"
            yield (
                f"`{where}.theta` is {self.theta:g}: {effect} the {theta:g} of model.hf; a longer window "
                "needs a larger base; raise it, or use rope: none"
            )

    def extended(self, source: RopeSource) -> dict[str, Any]:
        return {**source.parameters, "rope_theta": float(self.theta)}
