"""No extension of RoPE: for a window the model has already, or reaches by training alone."""

from typing import Any, Literal

from longred_megatron.rope.base import RopeMethod, RopeSource


class UnchangedRope(RopeMethod):
    """The source's own RoPE."""

    method: Literal["none"] = "none"

    def extended(self, source: RopeSource) -> dict[str, Any]:
        return dict(source.parameters)
