"""How sure an accuracy is, and how sure the difference between two on the same items."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Z_95 = 1.959964
AT_ONCE = 2**22  # drawn items in memory


class Interval(NamedTuple):
    """A mean and its 95 % interval; NaN where there is nothing to tell it from."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a score minus that of the reference over the same items, its 95 % interval, and how many items turned."""

    mean: float
    low: float
    high: float
    gained: int  # items that score higher than under the reference
    lost: int


def mean_interval(score_I: ArrayLike) -> Interval:
    """Of right (1) or wrong (0) by Wilson's score interval; of other scores by the normal approximation."""
    scores = np.asarray(score_I, float)
    count = len(scores)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(scores.mean())
    if not np.isin(scores, (0.0, 1.0)).all():
        half = Z_95 * float(scores.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return Interval(mean, mean - half, mean + half)
    shrink = 1 + Z_95**2 / count
    centre = (mean + Z_95**2 / (2 * count)) / shrink
    half = Z_95 * math.sqrt(mean * (1 - mean) / count + Z_95**2 / (4 * count**2)) / shrink
    return Interval(mean, min(max(0.0, centre - half), mean), max(min(1.0, centre + half), mean))


def paired_difference(score_I: ArrayLike, reference_I: ArrayLike, seed: int = 0, resamples: int = 10_000) -> Difference:
    """With the percentile bootstrap's interval over items: what two scores of an item have in common cancels.

    The same seed gives the same interval. Raises ValueError where the two do not pair up.
    """
    scores, reference = np.asarray(score_I, float), np.asarray(reference_I, float)
    if scores.ndim != 1 or scores.shape != reference.shape:
        raise ValueError(f"{scores.shape} scores and {reference.shape} references are no pairs")
    difference_I = scores - reference
    gained, lost = int((difference_I > 0).sum()), int((difference_I < 0).sum())
    if len(difference_I) < 2:
        mean = float(difference_I.mean()) if len(difference_I) else math.nan
        return Difference(mean, math.nan, math.nan, gained, lost)
    low, high = np.percentile(_resampled_means(difference_I, seed, resamples), [2.5, 97.5])
    return Difference(float(difference_I.mean()), float(low), float(high), gained, lost)


def _resampled_means(value_I: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Draws how often each distinct value comes rather than which items: there are few of them, and many items."""
    rng = np.random.default_rng(seed)
    values, counts = np.unique(value_I, return_counts=True)
    means_R = np.empty(resamples)
    step = max(1, AT_ONCE // len(values))
    for first in range(0, resamples, step):
        drawn_RV = rng.multinomial(len(value_I), counts / len(value_I), size=min(step, resamples - first))
        means_R[first : first + step] = drawn_RV @ values / len(value_I)
    return means_R
