"""Means over seeds and over texts or prompts, with intervals for both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longred_megatron.evaluation.intervals import student_quantile


@dataclass(frozen=True)
class Estimate:
    """low, high: the ends of the 95 % interval."""

    mean: float
    low: float
    high: float


def differences(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """ours - theirs, [seeds, units]: paired by unit (text, prompt), and by seed where both have as many.

    A model with a single seed is compared with each of the other's; of two that differ otherwise, the first seeds of
    both are.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if 1 not in (len(a), len(b)):
        seeds = min(len(a), len(b))
        a, b = a[:seeds], b[:seeds]
    return a - b


def estimate(values: NDArray[np.float64]) -> Estimate:
    """The mean of values[seeds, units] and its interval, for other seeds and other units (texts or prompts).

    With seeds and units as crossed random effects, the squared standard error of the mean is at most

        var over seeds of (mean over units) / seeds + var over units of (mean over seeds) / units

    (it counts the rest twice), on the degrees of freedom of Welch and Satterthwaite. Of one seed, the interval is for
    other units alone.
    """
    parts = [
        (means.var(ddof=1) / len(means), len(means) - 1) for means in (values.mean(1), values.mean(0)) if len(means) > 1
    ]
    square = sum(part for part, _ in parts)
    mean = float(values.mean())
    if not square > 0:
        return Estimate(mean, mean, mean)
    degrees = square**2 / sum(part**2 / free for part, free in parts)
    half = student_quantile(degrees) * math.sqrt(square)
    return Estimate(mean, mean - half, mean + half)
