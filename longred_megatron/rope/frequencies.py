"""Rotation frequencies of a RoPE, taken from transformers, so that training rotates as the exported model will.

A RoPE is a plain dict in the form of transformers' `rope_parameters`: `rope_type`, `rope_theta`, and the settings of
that type. Some types depend on the length at hand: the largest position of a forward call + 1.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LONGER_THAN_ANY = 2**31  # tokens


def rope_types() -> tuple[str, ...]:
    """The values of `rope_type` whose frequencies can be computed."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # slow to import

    return ("default", *ROPE_INIT_FUNCTIONS)


def inverse_frequencies(
    rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int, length: int = 1
) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, [head_dim // 2] in fp32, and the attention factor.

    The attention factor multiplies cosines and sines. Equal bit for bit to what transformers computes on a CPU.

    Args:
        max_position_embeddings: of the model's config.json, in tokens.
        length: largest position + 1, over all sequences that one forward call sees.

    Raises ValueError for a type that transformers does not have, an odd head_dim, and partial rotation.
    """
    rope_type = rope_parameters["rope_type"]
    if rope_type not in rope_types():
        raise ValueError(f"rope_type {rope_type!r:.60} is not supported; supported are {', '.join(rope_types())}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; RoPE rotates pairs")
    if rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        partial = rope_parameters["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
    if rope_type == "default":  # not in transformers' table
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / rope_parameters["rope_theta"] ** exponents, 1.0

    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PreTrainedConfig()
    config.hidden_size, config.num_attention_heads, config.head_dim = head_dim, 1, head_dim
    config.max_position_embeddings, config.rope_parameters = max_position_embeddings, dict(rope_parameters)
    # Past the window transformers reckons with a tensor, in fp32; up to it, with Python's numbers.
    seq_len = length if length <= max_position_embeddings else torch.tensor(length)
    return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=seq_len)


def frequency_problem(rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> str | None:
    """What keeps `inverse_frequencies` from positive, finite numbers, in words; None: nothing."""
    for length in (1, LONGER_THAN_ANY):
        try:
            frequencies, factor = inverse_frequencies(rope_parameters, head_dim, max_position_embeddings, length)
        except KeyError as error:
            return f"RoPE lacks its setting {error}"
        except Exception as error:  # transformers checks little: whatever its arithmetic ends in
            return f"RoPE's frequencies cannot be computed ({' '.join(str(error).split())})"
        if frequencies.shape != (head_dim // 2,):
            return f"RoPE has {frequencies.numel()} frequencies for the {head_dim // 2} pairs of a head"
        if not (frequencies.isfinite().all() and (frequencies > 0).all() and 0 < factor < math.inf):
            return "RoPE's frequencies or its attention factor are not positive, finite numbers"
    return None


def same_frequencies(rope_parameters: dict[str, Any], head_dim: int, window: int, other_window: int) -> bool:
    """Whether two models that differ in `max_position_embeddings` alone rotate alike, at any length."""
    for length in (1, LONGER_THAN_ANY):
        ours, factor = inverse_frequencies(rope_parameters, head_dim, window, length)
        theirs, other_factor = inverse_frequencies(rope_parameters, head_dim, other_window, length)
        if factor != other_factor or not torch.equal(ours, theirs):
            return False
    return True


class RotaryFrequencies:
    """The frequencies of one model on its device, for the length of each micro-batch.

    attention_factor: the same for every length.
    """

    def __init__(
        self,
        rope_parameters: dict[str, Any],
        head_dim: int,
        max_position_embeddings: int,
        device: torch.device | int | str = "cpu",
    ) -> None:
        self._arguments, self._device = (rope_parameters, head_dim, max_position_embeddings), device
        # By length, since the numbers take a millisecond; and by value, since many lengths may share one tensor.
        self._at = lru_cache(maxsize=1024)(self._compute)
        self._put = lru_cache(maxsize=1024)(self._copy)
        shortest, self.attention_factor = inverse_frequencies(*self._arguments, length=1)
        longest, _ = inverse_frequencies(*self._arguments, length=LONGER_THAN_ANY)
        self._of_all_lengths = self._at(1) if torch.equal(shortest, longest) else None

    def __call__(self, length: int | None) -> Tensor:
        """Radians per position, [head_dim // 2] in fp32.

        length: largest position + 1 of the whole micro-batch, on all its context-parallel ranks; None will do for a
        RoPE that does not depend on it.
        """
        if self._of_all_lengths is not None:
            return self._of_all_lengths
        assert length is not None, f"RoPE {self._arguments[0]['rope_type']} depends on the length"
        return self._at(length)

    def _compute(self, length: int) -> Tensor:
        frequencies, factor = inverse_frequencies(*self._arguments, length=length)
        assert factor == self.attention_factor  # it is a part of the model's softmax scale
        return self._put(frequencies.numpy().tobytes())

    def _copy(self, values: bytes) -> Tensor:
        return torch.frombuffer(bytearray(values), dtype=torch.float32).to(self._device, non_blocking=True)
