"""RoPE scaling: from a source model's `rope_parameters` to the extended model's, and to rotation frequencies.

A RoPE is a plain dict in the form of transformers' `rope_parameters`: `rope_type`, `rope_theta`, and the
settings of that type. Sources: position interpolation (arXiv 2306.15595), adjusted base frequency
(arXiv 2309.16039), YaRN (arXiv 2309.00071), Llama 3.1's scaling.
"""

import math
from typing import Any

import torch
from torch import Tensor

METHODS = ("abf", "pi", "yarn", "none")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
YARN_SETTINGS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


def extended_rope(
    source: dict[str, Any],
    *,
    method: str,
    original_window: int,
    theta: float | None = None,
    factor: float | None = None,
    **yarn_settings: Any,
) -> dict[str, Any]:
    """The RoPE of the model with the longer window.

    - abf: `rope_theta` becomes `theta`; a scaling that the source has stays.
    - pi: type linear with `factor`.
    - yarn: type yarn with `factor`, original_max_position_embeddings = `original_window` (tokens), and
      what is given of `YARN_SETTINGS`.
    - none: the source's own.
    pi and yarn may change the base as well (`theta`). None means not given.

    Raises ValueError for an unknown method, a missing setting, one without effect, and for pi or yarn on a
    source that is scaled already.
    """
    if method not in METHODS:
        raise ValueError(f"rope method {method!r} is not known; choose one of {', '.join(METHODS)}")
    settings = {name: value for name, value in yarn_settings.items() if value is not None}
    _check_settings(method, {"theta": theta, "factor": factor, **settings})
    base = {} if theta is None else {"rope_theta": float(theta)}
    if method in ("abf", "none"):
        return {**source, **base}
    if source["rope_type"] != "default":
        raise ValueError(
            f"rope method {method!r} cannot go on top of the model's own {source['rope_type']!r} scaling; "
            "use abf, which keeps that scaling, or none"
        )
    if method == "pi":
        return {**source, **base, "rope_type": "linear", "factor": factor}
    return {
        **source,
        **base,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_window,
        **settings,
    }


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, [head_dim // 2] in fp32, and the attention factor.

    The attention factor multiplies cosines and sines; it is 1.0 but for YaRN. Equal to transformers' numbers.
    Raises ValueError for a type not in `ROPE_TYPES`, an odd head_dim, and partial rotation.
    """
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; RoPE rotates pairs")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1.0 is")
    periods = rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope_type == "linear":
        return 1.0 / periods / rope["factor"], 1.0
    if rope_type == "llama3":
        return _llama3(1.0 / periods, rope), 1.0
    if rope_type == "yarn":
        return _yarn(periods, rope, head_dim), _yarn_attention_factor(rope)
    return 1.0 / periods, 1.0


def _check_settings(method: str, settings: dict[str, Any]) -> None:
    """Raises ValueError unless `settings` has all that the method needs and nothing that it would ignore."""
    required = {"abf": {"theta"}, "pi": {"factor"}, "yarn": {"factor"}, "none": set()}[method]
    optional = {"abf": set(), "pi": {"theta"}, "yarn": {"theta", *YARN_SETTINGS}, "none": set()}[method]
    given = {name for name, value in settings.items() if value is not None}
    if missing := sorted(required - given):
        raise ValueError(f"rope method {method!r} needs {', '.join(missing)}")
    if unused := sorted(given - required - optional):
        raise ValueError(f"rope method {method!r} does not use {', '.join(unused)}; remove it")


def _llama3(frequencies: Tensor, rope: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones stay, between them the two are blended linearly
    in window / wavelength (Llama 3.1)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    window = rope["original_max_position_embeddings"]
    keep = (window / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / rope["factor"] + keep * frequencies
    scaled = torch.where(wavelengths > window / low, frequencies / rope["factor"], blended)
    return torch.where(wavelengths < window / high, frequencies, scaled)


def _yarn(periods: Tensor, rope: dict[str, Any], head_dim: int) -> Tensor:
    """Pairs that turn more than `beta_fast` times in the original window stay, those below `beta_slow` turns
    are divided by `factor`, those between follow a linear ramp over the pair's index (YaRN, section 3.2)."""
    low = _pair_turning(rope.get("beta_fast") or 32, rope, head_dim)  # 32 and 1: YaRN's own values
    high = _pair_turning(rope.get("beta_slow") or 1, rope, head_dim)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - interpolated
    return 1.0 / (rope["factor"] * periods) * (1 - kept) + 1.0 / periods * kept


def _pair_turning(turns: float, rope: dict[str, Any], head_dim: int) -> float:
    """Index of the pair (a real number) that turns `turns` times in the original window."""
    wavelength = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope["rope_theta"]))


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    """0.1 * ln(factor) + 1 unless the dict names another (YaRN, section 3.4; mscale: DeepSeek's variant)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
