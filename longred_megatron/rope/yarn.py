"""YaRN (Peng et al., arXiv 2309.00071): NTK-by-parts interpolation and a scale of the attention."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from longred_megatron.rope.base import RopeMethod, RopeSource, factor_problems, scaled_twice_problems
from longred_megatron.settings import PositiveFloat


class YarnRope(RopeMethod):
    """YaRN: interpolates slow frequencies, keeps fast ones, ramps between (the defaults are its paper's)."""

    method: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(gt=1)] | None = Field(
        None, description="interpolation of the slow frequencies; left out: target window / original window"
    )
    beta_fast: PositiveFloat = Field(32.0, description="turns in the original window above which a frequency is kept")
    beta_slow: PositiveFloat = Field(
        1.0, description="turns in the original window below which a frequency is fully interpolated"
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="scale of the rotary tables; left out: 0.1 ln(factor) + 1, as in the paper"
    )

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        yield from scaled_twice_problems(self.method, where, source)
        yield from factor_problems(self.factor, where, source)
        if self.beta_fast <= self.beta_slow:
            yield (
                f"`{where}.beta_fast` is {self.beta_fast:g}: must be greater than beta_slow "
                f"{self.beta_slow:g}; YaRN's own values are 32 and 1"
            )

    def extended(self, source: RopeSource) -> dict[str, Any]:
        return {
            **source.parameters,
            "rope_type": "yarn",
            "factor": self.factor or source.ratio,
            "original_max_position_embeddings": source.original_window,
            **self.model_dump(include={"beta_fast", "beta_slow", "attention_factor"}, exclude_none=True),
        }
