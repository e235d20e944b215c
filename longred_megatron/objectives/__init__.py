"""The objectives a step can train: one file a kind. A file put here is one; see `base`."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from longred_megatron.objectives.base import Objective
from longred_megatron.settings import discovered, tags

KINDS: dict[str, type[Objective]] = {
    name: kind for kind in discovered(__name__, list(__path__), Objective, "kind") for name in tags(kind, "kind")
}
"""Every kind by its name, and by its other names."""

if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = Annotated[reduce(or_, dict.fromkeys(KINDS.values())), Field(discriminator="kind")]
