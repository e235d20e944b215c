"""RoPE scaling as a recipe says it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from longred_megatron.settings import PositiveFloat, Settings


class AbfRope(Settings):
    """Adjusted base frequency: only RoPE's base grows; nothing else of the source's RoPE changes."""

    method: Literal["abf"] = "abf"
    theta: PositiveFloat = Field(description="RoPE base of the longer window, e.g. 2.0e7 for 32K from 8K")


class PiRope(Settings):
    """Position interpolation: every position is divided by the factor."""

    method: Literal["pi"] = "pi"
    factor: Annotated[float, Field(gt=1)] | None = Field(
        None, description="divisor of the positions; left out: target window / original window"
    )


class YarnRope(Settings):
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


class UnchangedRope(Settings):
    """The source's own RoPE."""

    method: Literal["none"] = "none"


def _expand_bare_method(value: Any) -> Any:
    return {"method": "none"} if value == "none" else value


Rope = Annotated[
    Annotated[AbfRope | PiRope | YarnRope | UnchangedRope, Field(discriminator="method")],
    BeforeValidator(_expand_bare_method),
]
