"""95 % intervals: of shares, of means over documents or prompts, and of differences measured on the same of them."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
NUM_RESAMPLES = 4000  # the ends of an interval then move by about 2 % of its width from seed to seed
_WEIGHTS_AT_ONCE = 2**22  # 32 MiB


@dataclass(frozen=True)
class Interval:
    """Holds the true value in 95 of 100 repetitions with new documents or prompts."""

    low: float
    high: float


def share_interval(share: float, number: int) -> Interval:
    """Of a share of `number` independent prompts (Wilson 1927): never outside of 0 to 1, and no point at its ends."""
    center = share + Z**2 / (2 * number)
    half = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    scale = 1 + Z**2 / number
    return Interval(max((center - half) / scale, 0.0), min((center + half) / scale, 1.0))


def mean_interval(
    values: NDArray[np.float64], clusters: ArrayLike, weights: ArrayLike | None = None, seed: int = 0
) -> list[Interval] | None:
    """Of the means of the columns of `values` [rows, columns], by resampling clusters of rows with all their rows.

    mean = sum over rows of weight * value / sum over rows of weight; weights: [rows], default 1. clusters: [rows],
    the document or prompt of each row. The percentile bootstrap with its levels moved outwards for few clusters
    (Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279). Differences of two models on the
    same rows make it a paired interval. None for a single cluster.
    """
    numbers = np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(numbers.max()) + 1
    if num_clusters == 1:
        return None
    of_rows = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    # [clusters, columns + 1]: the sums of a cluster, and of its weights.
    sums = np.zeros((num_clusters, values.shape[1] + 1))
    np.add.at(sums, numbers, np.column_stack([values * of_rows[:, None], of_rows]))
    tail = _tail(num_clusters)
    with np.errstate(invalid="ignore"):  # a column with a value that is not finite has no finite interval
        means = _resampled_means(sums, np.random.default_rng(seed))
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def score_interval(scores: ArrayLike, seed: int = 0) -> Interval | None:
    """Of a mean score from 0 to 1 over independent prompts: `share_interval` where every score is 0 or 1, else
    `mean_interval`."""
    values = np.asarray(scores, dtype=np.float64)
    if np.isin(values, (0, 1)).all():
        return share_interval(float(values.mean()), len(values))
    intervals = mean_interval(values[:, None], np.arange(len(values)), seed=seed)
    return intervals[0] if intervals else None


def difference_interval(ours: ArrayLike, theirs: ArrayLike, seed: int = 0) -> Interval | None:
    """Of the difference of two mean scores on the same prompts, in the same order.

    Where every score is 0 or 1, from the prompts on which the two part (Bonett and Price 2012: with one prompt
    added to each side, so that two models that agree on ten prompts do not agree for certain); else
    `mean_interval` of the differences.
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if not (np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all()):
        intervals = mean_interval(differences[:, None], np.arange(len(differences)), seed=seed)
        return intervals[0] if intervals else None
    number = len(differences) + 2
    gained, lost = (((differences == sign).sum() + 1) / number for sign in (1, -1))
    center, half = gained - lost, Z * math.sqrt((gained + lost - (gained - lost) ** 2) / number)
    return Interval(max(float(center - half), -1.0), min(float(center + half), 1.0))


def combined_interval(means: list[float], intervals: list[Interval]) -> Interval:
    """Of the mean of independent means, each with its interval (Zou and Donner 2008): squared distances to the ends
    add."""
    center = sum(means) / len(means)
    below, above = (
        math.sqrt(sum((mean - getattr(each, end)) ** 2 for mean, each in zip(means, intervals, strict=True)))
        for end in ("low", "high")
    )
    return Interval(center - below / len(means), center + above / len(means))


def _resampled_means(sums: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """[resamples, columns]: means when as many clusters are drawn with replacement."""
    num_clusters = len(sums)
    means = []
    left = NUM_RESAMPLES
    while left:
        number = min(left, max(1, _WEIGHTS_AT_ONCE // num_clusters))
        drawn = rng.integers(num_clusters, size=(number, num_clusters))
        drawn += num_clusters * np.arange(number)[:, None]  # so that each resample is counted apart
        times = np.bincount(drawn.ravel(), minlength=number * num_clusters).reshape(number, num_clusters)
        drawn_sums = times @ sums
        means.append(drawn_sums[:, :-1] / drawn_sums[:, -1:])
        left -= number
    return np.concatenate(means)


def _tail(num_clusters: int) -> float:
    """The share of resampled means below the interval: 2.5 %, less for few clusters, whose resampled means vary by
    sqrt((n - 1) / n) too little and whose own spread is uncertain as Student's t says."""
    wider = math.sqrt(num_clusters / (num_clusters - 1)) * student_quantile(num_clusters - 1)
    return NormalDist().cdf(-wider)


def student_quantile(freedom: float) -> float:
    """q with P(|t| <= q) = 95 % for Student's t of `freedom` degrees of freedom, 1 or more.

    With t = sqrt(freedom) * tan(angle) its density is cos(angle) ** (freedom - 1), up to a factor.
    """
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(CONFIDENCE, share / share[-1], angles)))
