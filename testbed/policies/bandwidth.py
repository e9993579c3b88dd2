"""How the band is split among the devices, and how long a block then takes. Pure functions of what a policy sees.

N devices, W ways (down, up), B blocks. A device that is given B_n Hz, the same in both ways, takes for a block

    time_n(B_n) = fixed_n + sum over W of bits_Wn / R(B_n; snr_hz_Wn),    R(B; s) = B log2(1 + s / B)  (Eq. 2, 3),

R(B; inf) = B being rate shaping. `State` tells times at the even split, where a row takes row_s_WN of air time: so
bits = rows * row_s * R(even), and fixed is what is left of the cost. R is increasing and concave in B. A state without
`air` has no band to split: every function that needs one raises ConfigError.

A device of which the cost, the air time or snr_hz is unknown gets the even part of the band; the rest is split as well
as can be among the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.errors import ConfigError
from testbed.policies.allocation_kernels import allocate_block
from testbed.policies.base import Air, BoolArray, FloatArray, IntArray, State
from testbed.policies.period_kernels import allocate_period

FLOOR_OF_EVEN = 0.1  # least share over a period: who had no rows may get some, and costs the others a tenth at most
MOST_BITS_PER_S_PER_HZ = 64.0  # no radio carries as much: a higher rate was not bound by the band


def block_shares(
    rows_N: IntArray, experts_N: IntArray, state: State, start_N: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """Shares of the band that make the slowest device of a block as fast as can be, and the seconds it then takes.

    rows_N, experts_N: rows and different experts each device gets. start_N: shares close to the answer, if there are
    any, as of a block that differs little. The shares sum to 1; a device without rows gets 0; without any rows at all
    the split is even. If of all devices with rows none is known, they share evenly. NaN seconds: one is not known.
    """
    air = _air(state)
    busy_N = np.asarray(rows_N) > 0
    known_N = busy_N & _known(state, air)
    if not known_N.any():
        share_N = proportional_shares(busy_N)
        return share_N, block_time_s(rows_N, experts_N, state, share_N)
    fixed_s_N, row_bits_WN = _fixed_and_row_bits(rows_N, experts_N, state, air)
    unknown_N = busy_N & ~known_N
    left = 1 - np.count_nonzero(unknown_N) / len(busy_N)
    known_share_N = _floats(np.where(known_N, 0 if start_N is None else start_N, 0))
    allocate_block(
        _floats(np.where(known_N, fixed_s_N, 0)),
        _floats(np.where(known_N, rows_N * row_bits_WN, 0)),
        _floats(np.where(known_N, air.snr_hz_WN, 1)),
        left * air.bandwidth_hz,
        known_share_N,
    )
    share_N = np.where(unknown_N, 1 / len(busy_N), left * known_share_N)
    return share_N, block_time_s(rows_N, experts_N, state, share_N)


def proportional_shares(rows_N: IntArray | BoolArray) -> FloatArray:
    """Shares proportional to the rows; even where there are none at all."""
    weight_N = np.asarray(rows_N, float)
    share_N: FloatArray = (weight_N if weight_N.any() else np.ones(len(weight_N))) / (weight_N.sum() or len(weight_N))
    return share_N


def period_shares(rows_BN: IntArray, experts_BN: IntArray, state: State) -> FloatArray:
    """One split for several blocks to come, from recent ones: it minimises the sum of what those would have taken.

    Every device keeps at least FLOOR_OF_EVEN / N. Within that, the answer is within 2e-5 of the least sum, and never
    worse than the even split, which it is where nothing is known or no block has rows. The sum is convex in the shares.
    """
    air = _air(state)
    known_N = _known(state, air)
    rows_BN = np.where(known_N, rows_BN, 0)
    in_use_B = rows_BN.any(axis=1)
    rows_BN, experts_BN = rows_BN[in_use_B], np.asarray(experts_BN)[in_use_B]
    even_N = np.full(len(known_N), 1 / len(known_N))
    if not in_use_B.any():
        return even_N
    even_s = _summed_s(rows_BN, experts_BN, state, even_N)
    unit_s = even_s / len(rows_BN)
    fixed_s_BN, row_bits_WN = _fixed_and_row_bits(rows_BN, experts_BN, state, air)
    share_N = even_N[known_N]
    allocate_period(
        _floats(np.where(rows_BN > 0, fixed_s_BN / unit_s, 0)[:, known_N]),
        _floats(rows_BN[:, known_N]),
        _floats(row_bits_WN[:, known_N] / unit_s),
        _floats(air.snr_hz_WN[:, known_N]),
        air.bandwidth_hz,
        FLOOR_OF_EVEN / len(known_N),
        share_N,
    )
    best_N = even_N.copy()
    best_N[known_N] = share_N
    return best_N if _summed_s(rows_BN, experts_BN, state, best_N) < even_s else even_N


def block_time_s(rows_N: IntArray, experts_N: IntArray, state: State, share_N: FloatArray | None = None) -> float:
    """Predicted seconds of a block, which waits for its slowest device; NaN if that of a device with rows is unknown.

    share_N: of the band; None is the even split, at which this is the largest of `state.cost_s_N`.
    """
    return float(device_times_s(rows_N, experts_N, state, share_N).max(initial=0.0))


def device_times_s(
    rows_N: IntArray, experts_N: IntArray, state: State, share_N: FloatArray | None = None
) -> FloatArray:
    """Each device's predicted seconds of a block under shares of the band: 0 without rows, infinite with rows and no
    band, NaN if unknown. A device that has the even part needs no known snr_hz. Also of shape BN.
    """
    cost_s_N = state.cost_s_N(rows_N, experts_N)
    if share_N is None:
        return cost_s_N
    air = _air(state)
    even_N = np.equal(share_N, 1 / len(share_N))
    with np.errstate(divide="ignore", invalid="ignore"):
        slower_WN = 1 / _rate_ratio(air, share_N) - 1
        added_s_N = rows_N * (air.row_s_WN * slower_WN).sum(axis=0)
    return np.where(even_N | np.equal(rows_N, 0), cost_s_N, cost_s_N + added_s_N)


def rate_ratio(air: Air, share_N: FloatArray) -> FloatArray:
    """ratio_WN = R(share * bandwidth) / R(even): an air time measured under these shares, times it, is that at the even
    split. 1 for the even share, whatever is known; NaN for a share of 0, under which nothing was measured.
    """
    ratio_WN = _rate_ratio(air, share_N)
    return np.where(np.equal(share_N, 0), np.nan, ratio_WN)


def rates_bits_per_s(air: Air, share_N: FloatArray) -> FloatArray:
    """rate_WN that each link carries under these shares (Eq. 2, 3), as far as its snr_hz is known."""
    return _rate_bits_per_s(np.multiply(share_N, air.bandwidth_hz), air.snr_hz_WN)


def spectral_snr_hz(row_bits: ArrayLike, row_s: ArrayLike, even_hz: float) -> FloatArray:
    """snr_hz from a measured rate: the s with R(even_hz; s) = row_bits / row_s, even_hz (2^(rate / even_hz) - 1).

    row_bits: of one row; row_s: its measured air time at the even split. NaN where that is unknown or not above 0.
    A rate above 64 bit/s per Hz counts as that.
    """
    row_s = np.asarray(row_s, float)
    known_s = np.where((row_s > 0) & (row_s < np.inf), row_s, np.nan)
    efficiency = np.minimum(np.divide(row_bits, known_s) / even_hz, MOST_BITS_PER_S_PER_HZ)
    return np.asarray(even_hz * np.expm1(efficiency * np.log(2)))


def _floats(values: FloatArray | IntArray) -> NDArray[np.float64]:
    return np.ascontiguousarray(values, np.float64)


def _air(state: State) -> Air:
    if state.air is None:
        raise ConfigError("no band to split: the channel's bandwidth is not known here; allocate none, or give it one")
    return state.air


def _known(state: State, air: Air) -> BoolArray:
    costs_N = np.isfinite(state.base_s_N + state.expert_s_N + state.row_s_N)
    air_WN = (air.row_s_WN > 0) & (air.row_s_WN < np.inf) & (air.snr_hz_WN > 0)
    known_N: BoolArray = costs_N & air_WN.all(axis=0)
    return known_N


def _fixed_and_row_bits(rows_N: IntArray, experts_N: IntArray, state: State, air: Air) -> tuple[FloatArray, FloatArray]:
    """Seconds that no band changes, of shape N or BN, and the bits of one row in each way, of shape WN."""
    fixed_s_N = state.cost_s_N(rows_N, experts_N) - rows_N * air.row_s_WN.sum(axis=0)
    return fixed_s_N, air.row_s_WN * _rate_bits_per_s(air.bandwidth_hz / len(state.row_s_N), air.snr_hz_WN)


def _rate_bits_per_s(band_hz: ArrayLike, snr_hz_WN: FloatArray) -> FloatArray:
    band_hz = np.asarray(band_hz, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_WN = np.where(np.isinf(snr_hz_WN), band_hz, band_hz * np.log1p(snr_hz_WN / band_hz) / np.log(2))
    return np.where(band_hz > 0, rate_WN, 0.0)


def _rate_ratio(air: Air, share_N: FloatArray) -> FloatArray:
    even_hz = air.bandwidth_hz / len(share_N)
    ratio_WN = _rate_bits_per_s(share_N * air.bandwidth_hz, air.snr_hz_WN) / _rate_bits_per_s(even_hz, air.snr_hz_WN)
    return np.where(np.equal(share_N, 1 / len(share_N)), 1.0, ratio_WN)


def _summed_s(rows_BN: IntArray, experts_BN: IntArray, state: State, share_N: FloatArray) -> float:
    return float(device_times_s(rows_BN, experts_BN, state, share_N).max(axis=1).sum())
