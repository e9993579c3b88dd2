"""How sure a figure is: intervals of what was compared pair by pair."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from testbed.policies.base import FloatArray

AT_ONCE = 2**22  # drawn pairs in memory


class CutInterval(NamedTuple):
    """A cut and its 95 % interval; NaN where it is unknown: one pair alone does not tell how much pairs differ."""

    cut: float
    low: float
    high: float


def paired_cut_interval(
    sums_P: FloatArray, reference_P: FloatArray, seed: int = 0, resamples: int = 10_000
) -> CutInterval:
    """1 - sum of `sums_P` / sum of `reference_P`, with the percentile bootstrap's 95 % interval over pairs.

    P pairs (prompts, draws, placements), each taken under both, in one unit (s). Whole pairs are resampled, so what the
    two of a pair have in common cancels; the sums are divided, not the pairs' cuts averaged. The same seed gives the
    same interval. Raises ValueError where the two do not pair up, or the reference is not above 0.
    """
    sums_P, reference_P = np.asarray(sums_P, float), np.asarray(reference_P, float)
    if sums_P.ndim != 1 or sums_P.shape != reference_P.shape:
        raise ValueError(f"{sums_P.shape} sums and {reference_P.shape} references are no pairs")
    if not reference_P.sum() > 0:
        return _nothing_to_cut(reference_P)
    cut = 1 - float(sums_P.sum() / reference_P.sum())
    if len(sums_P) < 2:
        return CutInterval(cut, math.nan, math.nan)
    low, high = np.percentile(_resampled_cuts(sums_P, reference_P, seed, resamples), [2.5, 97.5])
    return CutInterval(cut, float(low), float(high))


def _nothing_to_cut(reference_P: FloatArray) -> CutInterval:
    if len(reference_P) and not np.isnan(reference_P).any():
        raise ValueError("a cut needs a reference above 0")
    return CutInterval(math.nan, math.nan, math.nan)


def _resampled_cuts(sums_P: FloatArray, reference_P: FloatArray, seed: int, resamples: int) -> FloatArray:
    rng, pairs = np.random.default_rng(seed), len(sums_P)
    cuts_R = np.empty(resamples)
    step = max(1, AT_ONCE // pairs)
    for first in range(0, resamples, step):
        drawn_RP = rng.integers(pairs, size=(min(step, resamples - first), pairs))
        cuts_R[first : first + step] = 1 - sums_P[drawn_RP].sum(axis=1) / reference_P[drawn_RP].sum(axis=1)
    return cuts_R
