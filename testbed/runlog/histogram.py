"""A histogram of durations whose bins are one per cent wide: a quantile read from it is within 1 % of the rows' own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RATIO = 1.01
LEAST_NS = 1e-3  # a nanosecond stretched a thousand times; what is shorter, as nothing, is in bin 0
BINS = 4096  # the last ends at 5e14 ns, which is six days


def bin_of(duration_ns_V: Floats) -> Ints:
    """bin_V: bin b > 0 holds durations from LEAST_NS * RATIO ** (b - 1) up to the next power."""
    above_V = np.maximum(duration_ns_V, LEAST_NS / RATIO / 2)
    power_V = np.floor(np.log(above_V / LEAST_NS) / math.log(RATIO))
    bin_V: Ints = np.clip(power_V + 1, 0, BINS - 1).astype(np.int64)
    return bin_V


def middle_ns(bin_B: Ints) -> Floats:
    """A duration of each bin, wrong by half a per cent at most."""
    middle_B: Floats = np.where(bin_B > 0, LEAST_NS * RATIO ** (bin_B - 0.5), 0.0)
    return middle_B


def quantiles_ns(
    bin_B: Ints, count_B: Ints, quantiles: Sequence[float], least_ns: float, most_ns: float
) -> list[float]:
    """As numpy.quantile gives them, of ascending bins that all hold something."""
    duration_B = np.clip(middle_ns(bin_B), least_ns, most_ns)
    below_B = np.cumsum(count_B)
    place_Q = np.asarray(quantiles, float) * (below_B[-1] - 1)
    lower_Q = np.floor(place_Q)
    upper_Q = np.ceil(place_Q)
    lower_ns_Q, upper_ns_Q = (duration_B[np.searchsorted(below_B, rank_Q, "right")] for rank_Q in (lower_Q, upper_Q))
    between: list[float] = (lower_ns_Q + (upper_ns_Q - lower_ns_Q) * (place_Q - lower_Q)).tolist()
    return between
