"""Loops of bandwidth allocation. N devices, W ways (down, up), B blocks; shares are of the band that is shared out.

A device that has a share x of the band needs sum over W of bits / R(x * bandwidth) on the air, where
R(B) = B log2(1 + snr_hz / B) (Eq. 2, 3), or R = B where snr_hz is infinite. The helpers marked `inlined` are meant for
other compiled loops; called from Python they do the same, slowly.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import inlined, native, read, write

Floats = NDArray[np.float64]

LN2 = math.log(2)
MOST_PASSES = 100
SPREAD = 1e-11  # of the devices' times, relative, at which a split counts as the best: the best lies within it
SMALLEST_START = 1e-9


@inlined
def least_max_shares(
    fixed_s_N: Floats, bits_WN: Floats, snr_hz_WN: Floats, bandwidth_hz: float, share_N: Floats
) -> float:
    """Write to share_N what minimises max over n of fixed_s + sum over W of bits / R; answer that maximum in s.

    bits_WN are of all of a device's rows. A device without any gets nothing; an idle one has fixed_s 0, too. What
    share_N held is where to start: the last answer, or zeros for the even split. Where no device has bits the split
    is even. Nothing may be NaN, and every snr_hz must be above 0.

    A device's time is concave in 1 / share (x / log(1 + x) is), so its tangent there never lies below it: the best
    split of the tangents is at least as good for the times themselves. Taking tangents again where it lands is
    Newton's method, which so cannot overshoot. It ends where all take equally long: no other split is faster.
    """
    slope_s_N, intercept_s_N = np.zeros(len(share_N)), np.zeros(len(share_N))
    longest_fixed_s = fixed_s_N.max()
    if not _begin(bits_WN, share_N):
        return float(longest_fixed_s)
    slowest_s = 0.0
    for _ in range(MOST_PASSES):
        fastest_s, slowest_s = _take_tangents(
            fixed_s_N, bits_WN, snr_hz_WN, bandwidth_hz, share_N, slope_s_N, intercept_s_N
        )
        if slowest_s - fastest_s <= SPREAD * abs(slowest_s):
            break
        _split_for_tangents(slope_s_N, intercept_s_N, share_N)
    return float(max(slowest_s, longest_fixed_s))


@inlined
def _begin(bits_WN: Floats, share_N: Floats) -> bool:
    """Make share_N a split among the devices with bits, even for those that had nothing; False: there are none."""
    needed = 0
    for device in range(len(share_N)):
        needed += bits_WN[:, device].sum() > 0
    for device in range(len(share_N)):
        if needed > 0 and bits_WN[:, device].sum() == 0:
            share_N[device] = 0.0
        elif needed == 0 or not share_N[device] > 0:
            share_N[device] = 1 / max(needed, 1)
        else:
            share_N[device] = max(share_N[device], SMALLEST_START)
    share_N /= share_N.sum()
    return needed > 0


@inlined
def _take_tangents(
    fixed_s_N: Floats,
    bits_WN: Floats,
    snr_hz_WN: Floats,
    bandwidth_hz: float,
    share_N: Floats,
    slope_s_N: Floats,
    intercept_s_N: Floats,
) -> tuple[float, float]:
    """time <= intercept + slope / share, with equality at share_N; answers the shortest and the longest time."""
    fastest_s, slowest_s = np.inf, -np.inf
    for device in range(len(share_N)):
        if share_N[device] > 0:
            band_hz = share_N[device] * bandwidth_hz
            time_s, slope_s = fixed_s_N[device], 0.0
            for way in range(len(bits_WN)):
                if bits_WN[way, device] > 0:
                    rate, gain, _ = rate_gain_curve(band_hz, snr_hz_WN[way, device])
                    air_s = bits_WN[way, device] / rate
                    time_s += air_s
                    slope_s += air_s * gain * band_hz / rate
            slope_s_N[device] = slope_s * share_N[device]
            intercept_s_N[device] = time_s - slope_s
            fastest_s, slowest_s = min(fastest_s, time_s), max(slowest_s, time_s)
    return fastest_s, slowest_s


@inlined
def rate_gain_curve(band_hz: float, snr_hz: float) -> tuple[float, float, float]:
    """R in bit/s, and its first and second derivative by the band in Hz."""
    if snr_hz == np.inf:
        return band_hz, 1.0, 0.0
    ratio = snr_hz / band_hz
    log = math.log1p(ratio)
    part = ratio / (1 + ratio)
    gain = log - part if ratio > 1e-4 else ratio**2 * (0.5 - ratio * (2 / 3 - 0.75 * ratio))  # they almost cancel
    return band_hz * log / LN2, gain / LN2, -(part**2) / (band_hz * LN2)


@inlined
def _split_for_tangents(slope_s_N: Floats, intercept_s_N: Floats, share_N: Floats) -> None:
    """The split under which intercept + slope / share is the same for all: sum of slope / (that - intercept) is 1.

    1 / sum is concave in the common time, so Newton's method approaches it from below and never passes it. Times are
    counted from the highest intercept, since the common time may lie very close above.
    """
    top_s = -np.inf
    for device in range(len(share_N)):
        if slope_s_N[device] > 0:
            top_s = max(top_s, intercept_s_N[device])
    above_s = 0.0
    for device in range(len(share_N)):
        above_s = max(above_s, slope_s_N[device] - (top_s - intercept_s_N[device]))
    for _ in range(MOST_PASSES):
        total, change = 0.0, 0.0
        for device in range(len(share_N)):
            if slope_s_N[device] > 0:
                share = slope_s_N[device] / (above_s + (top_s - intercept_s_N[device]))
                share_N[device] = share
                total += share
                change += share**2 / slope_s_N[device]
        if total - 1 <= 1e-14:
            break
        above_s += total * (total - 1) / change
    share_N /= share_N.sum()


@native(
    read(types.float64, 1),
    read(types.float64, 2),
    read(types.float64, 2),
    types.float64,
    write(types.float64, 1),
)
def allocate_block(fixed_s_N: Floats, bits_WN: Floats, snr_hz_WN: Floats, bandwidth_hz: float, share_N: Floats) -> int:
    """`least_max_shares`, compiled for a call from Python."""
    least_max_shares(fixed_s_N, bits_WN, snr_hz_WN, bandwidth_hz, share_N)
    return 0
