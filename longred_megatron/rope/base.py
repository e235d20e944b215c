"""What a RoPE method is: its recipe keys, its checks, and the extended model's `rope_parameters`.

A method is one class in one file of this folder, and a file put here is a method: the rest of the program asks the
class and does not know its name. Frequencies are no part of it: they come from transformers, see `frequencies.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longred_megatron.rope.frequencies import same_frequencies
from longred_megatron.settings import Settings


@dataclass(frozen=True)
class RopeSource:
    """What a method may know of the model that it extends. Windows are in tokens.

    parameters: transformers' `rope_parameters` of the model as released: `rope_type`, `rope_theta` and what that type
    has beside them. original_window: the model's own; target_window: the recipe's.
    """

    parameters: dict[str, Any]
    head_dim: int
    original_window: int
    target_window: int

    @property
    def rope_type(self) -> str:
        return self.parameters.get("rope_type", "default")

    @property
    def ratio(self) -> float:
        """Target window / original window."""
        return self.target_window / self.original_window


class RopeMethod(Settings):
    """A sub-class adds `method: Literal["its_name"] = "its_name"` and its own keys."""

    if TYPE_CHECKING:
        method: str

    def problems(self, where: str, source: RopeSource) -> Iterator[str]:
        """Everything wrong with it on this model, each a sentence: key, value, rule and what to change.

        where: the path of its keys in the recipe.
        """
        return iter(())

    def extended(self, source: RopeSource) -> dict[str, Any]:
        """transformers' `rope_parameters` of the model with the longer window. `problems` has found none."""
        raise NotImplementedError

    def max_position_embeddings(self, source: RopeSource) -> int:
        """What stands in the extended model's config.json, in tokens: the target window.

        But where the frequencies themselves are counted from that number, as those of dynamic NTK are, it stays the
        original window, and the model reaches past it.
        """
        original, target = source.original_window, source.target_window
        return target if same_frequencies(self.extended(source), source.head_dim, original, target) else original


def scaled_twice_problems(method: str, where: str, source: RopeSource) -> Iterator[str]:
    """Whether the source is scaled already, for methods that put a scaling of their own on it."""
    if source.rope_type != "default":
        yield (
            f"`{where}.method` is {method!r}: model.hf already has scaled RoPE ({source.rope_type}), which "
            "cannot be scaled twice; use abf, which keeps its scaling, or none"
        )


def factor_problems(factor: float | None, where: str, source: RopeSource) -> Iterator[str]:
    """Whether an interpolation by `factor` (None: by the ratio of the windows) reaches the target window."""
    original, target = source.original_window, source.target_window
    if factor is None and source.ratio <= 1:
        yield (
            f"`{where}.factor` is left out and {target} / {original} gives {source.ratio:g}: must be greater "
            "than 1; raise `model.max_position_embeddings` or use rope: none"
        )
    if factor is not None and factor < source.ratio:
        yield (
            f"`{where}.factor` is {factor:g}: reaches only {int(factor * original)} of the "
            f"{target} positions of `model.max_position_embeddings`; use {source.ratio:g} or leave it out"
        )
