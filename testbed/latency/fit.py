"""How one quantity of a device (compute, down or up) is learnt: seconds = c0 + c1 * experts + c2 * rows, all >= 0.

A Kalman filter over the coefficients in which three things may explain what a lesson brings, each as far as its
variance goes: noise of the measurement, a shape not yet known (`spread_CC`), and a level that moved, which scales all
coefficients alike. The last is how a fading link and a throttled processor change, so that the shape outlives both.

C coefficients (of a round, of an expert touched, of a row), in seconds; M what is remembered of the lessons' manner.
"""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import inlined, native, read, write

Floats = NDArray[np.float64]

NOISE, HELD = 0, 1  # places in manner_M: relative noise of a lesson; what was held back of the last surprise, as log
START_NOISE, LEAST_NOISE, MOST_NOISE = 0.1, 0.02, 0.5
NOISE_STEP = 1.1  # up where a lesson misses by more than the noise, else down: it settles at the median miss
PRIOR_SHARE = (0.1, 0.2, 0.7)  # of a first lesson, before another of other size tells
LARGEST_STEP = log(1.4)  # what a single lesson, contradicting all others, may change
SURPRISING = 3.0  # standard deviations
DOUBT = 4.0  # a surprise may also mean that the shape is wrong: its variance grows by this factor
LEAST_S = 1e-9  # stands for a measured 0


@inlined
def bounded(value: Any, lowest: Any, highest: Any) -> Any:
    return min(max(value, lowest), highest)


@inlined
def scale(coef_C: Any, spread_CC: Any, factor: Any, doubt: Any) -> Any:
    """Restate all that was learnt at another level."""
    for i in range(3):
        coef_C[i] *= factor
        for j in range(3):
            spread_CC[i, j] *= factor * factor * doubt


@inlined
def dot(coef_C: Any, x_C: Any) -> Any:
    return coef_C[0] * x_C[0] + coef_C[1] * x_C[1] + coef_C[2] * x_C[2]


@inlined
def times(spread_CC: Any, x_C: Any) -> Any:
    return dot(spread_CC[0], x_C), dot(spread_CC[1], x_C), dot(spread_CC[2], x_C)


@inlined
def set_prior(coef_C: Any, spread_CC: Any, x_C: Any, seconds: Any) -> Any:
    """A plausible shape that gives `seconds`, so uncertain that each coefficient alone could be the whole."""
    known_share = PRIOR_SHARE[0] + PRIOR_SHARE[2] + (PRIOR_SHARE[1] if x_C[1] > 0 else 0.0)
    for i in range(3):
        whole = seconds / x_C[i] if x_C[i] > 0 else 0.0
        coef_C[i] = whole * PRIOR_SHARE[i] / known_share
        for j in range(3):
            spread_CC[i, j] = whole * whole if i == j else 0.0


@inlined
def bound_spread(spread_CC: Any, x_C: Any, largest_s: Any) -> Any:
    """No coefficient is less certain than to be nothing or the whole of `largest_s`; rounding leaves a covariance."""
    for i in range(3):
        most = largest_s / x_C[i] if x_C[i] > 0 else 0.0
        deviation = max(spread_CC[i, i], 0.0) ** 0.5
        shrink = most / deviation if deviation > most else 1.0
        for j in range(3):
            spread_CC[i, j] *= shrink
            spread_CC[j, i] *= shrink
    for i in range(3):
        spread_CC[i, i] = max(spread_CC[i, i], 0.0)
        for j in range(i):
            most = (spread_CC[i, i] * spread_CC[j, j]) ** 0.5
            spread_CC[i, j] = spread_CC[j, i] = bounded(spread_CC[i, j], -most, most)


@inlined
def keep_positive(coef_C: Any, spread_CC: Any) -> Any:
    """A negative coefficient becomes 0, and the others what they most likely are given that."""
    for _ in range(2):
        for i in range(3):
            if coef_C[i] < 0:
                ratio = coef_C[i] / spread_CC[i, i] if spread_CC[i, i] > 0 else 0.0
                for j in range(3):
                    coef_C[j] -= spread_CC[j, i] * ratio
                coef_C[i] = 0.0
    for i in range(3):
        coef_C[i] = max(coef_C[i], 0.0)


@inlined
def update(coef_C: Any, spread_CC: Any, x_C: Any, miss_s: Any, level_variance: Any, noise_variance_s2: Any) -> Any:
    """The Kalman step, the level's variance lying along the coefficients themselves."""
    predicted_s = dot(coef_C, x_C)
    along_C = times(spread_CC, x_C)
    shared_C = (
        along_C[0] + level_variance * predicted_s * coef_C[0],
        along_C[1] + level_variance * predicted_s * coef_C[1],
        along_C[2] + level_variance * predicted_s * coef_C[2],
    )
    variance_s2 = max(dot(shared_C, x_C), 0.0) + noise_variance_s2
    for i in range(3):
        for j in range(3):
            spread_CC[i, j] += level_variance * coef_C[i] * coef_C[j] - shared_C[i] * shared_C[j] / variance_s2
    for i in range(3):
        coef_C[i] += shared_C[i] * miss_s / variance_s2


@inlined
def stay_between(coef_C: Any, spread_CC: Any, x_C: Any, predicted_s: Any, seconds: Any) -> Any:
    """Whatever the bound at 0 did: at what was measured, the fit lies between the prediction and the measurement."""
    learnt_s = dot(coef_C, x_C)
    between_s = bounded(learnt_s, min(predicted_s, seconds), max(predicted_s, seconds))
    if learnt_s > 0:
        scale(coef_C, spread_CC, between_s / learnt_s, 1.0)
    else:
        set_prior(coef_C, spread_CC, x_C, between_s)


@inlined
def forget_along(spread_CC: Any, x_C: Any, growth: Any) -> Any:
    """Older lessons fade, but only in what this lesson tells about: a decode does not wear out what prefill taught."""
    along_C = times(spread_CC, x_C)
    variance_s2 = dot(along_C, x_C)
    if variance_s2 > 0:
        for i in range(3):
            for j in range(3):
                spread_CC[i, j] += growth * along_C[i] * along_C[j] / variance_s2


@native(write(types.float64, 1), write(types.float64, 2), write(types.float64, 1), types.boolean, *(types.float64,) * 4)
def learn(
    coef_C: Floats,
    spread_CC: Floats,
    manner_M: Floats,
    first: bool,
    experts: float,
    rows: float,
    measured_s: float,
    memory_rounds: float,
) -> int:
    """One lesson: `rows` rows (> 0) for `experts` experts (0 where they play no part) took `measured_s` (>= 0).

    What neither noise nor an unknown shape explains is believed by a factor of 1.4 at once, and beyond that as far as
    the next lesson bears it out. Returns 1 for such a surprise, else 0.
    """
    x_C, seconds = (1.0, experts, rows), max(measured_s, LEAST_S)
    if first:
        set_prior(coef_C, spread_CC, x_C, seconds)
        manner_M[NOISE], manner_M[HELD] = START_NOISE, 0.0
    predicted_s = dot(coef_C, x_C)
    miss_s, surprise, noise, held = seconds - predicted_s, log(seconds / predicted_s), manner_M[NOISE], manner_M[HELD]
    noisier = NOISE_STEP if abs(miss_s) > noise * predicted_s else 1 / NOISE_STEP
    manner_M[NOISE] = bounded(noise * noisier, LEAST_NOISE, MOST_NOISE)
    bound_spread(spread_CC, x_C, max(predicted_s, seconds))
    noise_s2 = (noise * predicted_s) ** 2
    expected_s2 = max(dot(times(spread_CC, x_C), x_C), 0.0) + noise_s2
    if abs(surprise) > LARGEST_STEP and miss_s * miss_s > SURPRISING**2 * expected_s2:
        step = bounded(surprise, min(held, 0.0) - LARGEST_STEP, max(held, 0.0) + LARGEST_STEP)
        manner_M[HELD] = surprise - step
        scale(coef_C, spread_CC, exp(step), DOUBT)
        return 1
    manner_M[HELD] = 0.0
    forget_along(spread_CC, x_C, 1 / memory_rounds)
    level_variance = max(miss_s * miss_s - expected_s2, 0.0) / predicted_s**2
    update(coef_C, spread_CC, x_C, miss_s, level_variance, noise_s2)
    keep_positive(coef_C, spread_CC)
    stay_between(coef_C, spread_CC, x_C, predicted_s, seconds)
    return 0


@native(read(types.float64, 3), read(types.float64, 1), types.float64, types.float64, write(types.float64, 2))
def token_costs(
    coef_NQC: Floats, slowdown_N: Floats, header_down_rows: float, header_up_rows: float, cost_s_4N: Floats
) -> int:
    """Into cost_s_4N: one token alone, and its parts: of a round, of an expert touched, of a row. NaN stays NaN.

    Q: compute, down, up. Headers are given in rows: a block's header travels as so large a part of a row.
    """
    for n in range(slowdown_N.size):
        compute_C, down_C, up_C = coef_NQC[n, 0], coef_NQC[n, 1], coef_NQC[n, 2]
        base_s = compute_C[0] + down_C[0] + up_C[0] + header_down_rows * down_C[2] + header_up_rows * up_C[2]
        cost_s_4N[1, n] = slowdown_N[n] * base_s
        cost_s_4N[2, n] = slowdown_N[n] * compute_C[1]
        cost_s_4N[3, n] = slowdown_N[n] * (compute_C[2] + down_C[2] + up_C[2])
        cost_s_4N[0, n] = cost_s_4N[1, n] + cost_s_4N[2, n] + cost_s_4N[3, n]
    return 0
