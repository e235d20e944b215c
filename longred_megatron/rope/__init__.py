"""RoPE methods, each a file of this folder, and the rotation frequencies of a RoPE."""

from functools import reduce
from importlib import import_module
from operator import or_
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from longred_megatron.rope.base import RopeMethod, RopeSource


def _discovered() -> dict[str, type[RopeMethod]]:
    """The methods in the modules of this package, by name; a new file is enough."""
    found: dict[str, type[RopeMethod]] = {}
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            is_class = isinstance(value, type) and issubclass(value, RopeMethod) and "method" in value.model_fields
            if is_class and value.__module__ == module.__name__:
                name = value.model_fields["method"].default
                if found.setdefault(name, value) is not value:
                    raise TypeError(f"two RoPE methods are called {name!r}: {found[name]} and {value}")
    return dict(sorted(found.items()))


METHODS = _discovered()


def _expand_bare_name(value: Any) -> Any:
    """`rope: none` is short for `rope: {method: none}`."""
    return {"method": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    Rope = RopeMethod
else:
    Rope = Annotated[reduce(or_, METHODS.values()), Field(discriminator="method"), BeforeValidator(_expand_bare_name)]

__all__ = ["METHODS", "Rope", "RopeMethod", "RopeSource"]
