"""RoPE methods, each a file of this folder, and the rotation frequencies of a RoPE."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from longred_megatron.rope.base import RopeMethod, RopeSource
from longred_megatron.settings import discovered, tags

METHODS: dict[str, type[RopeMethod]] = dict(
    sorted((tags(each, "method")[0], each) for each in discovered(__name__, list(__path__), RopeMethod, "method"))
)
"""Every method by its name."""


def _expand_bare_name(value: Any) -> Any:
    """`rope: none` is short for `rope: {method: none}`."""
    return {"method": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    Rope = RopeMethod
else:
    Rope = Annotated[reduce(or_, METHODS.values()), Field(discriminator="method"), BeforeValidator(_expand_bare_name)]

__all__ = ["METHODS", "Rope", "RopeMethod", "RopeSource"]
