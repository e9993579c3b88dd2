"""A block's devices for loops that share out the band: work that stays, and bits that wait for Hz.

N devices, W ways (down, up), M loads of one device each: rows and different experts. C what a round costs: base, per
expert, per row, in seconds. What is known, and what a device of unknown link gets, is as in `bandwidth.block_shares`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write
from testbed.policies.allocation_kernels import least_max_shares, rate_gain_curve
from testbed.policies.base import Air
from testbed.policies.dropping import Block, Floats, Ints

MOST_PASSES = 100
CLOSE = 1e-13


class Links(NamedTuple):
    """A link that is not known has no bits: its rows take what they take at the even split, and it keeps that part."""

    work_s_NC: Floats  # without the air, where that is known
    row_bits_WN: Floats
    snr_hz_WN: Floats
    bandwidth_hz: float


LINKS = (read(types.float64, 2), read(types.float64, 2), read(types.float64, 2), types.float64)


def links_of(block: Block, air: Air) -> Links:
    """What is known of the links of a block's devices."""
    part_hz = air.bandwidth_hz / len(block.known_N)
    known_WN = (air.row_s_WN > 0) & (air.row_s_WN < np.inf) & (air.snr_hz_WN > 0)
    known_N = known_WN.all(axis=0) & block.known_N
    row_s_WN = np.where(known_N, air.row_s_WN, 0.0)
    snr_hz_WN = np.where(known_N, air.snr_hz_WN, np.inf)
    with np.errstate(invalid="ignore"):
        rate_WN = np.where(np.isinf(snr_hz_WN), part_hz, part_hz * np.log2(1 + snr_hz_WN / part_hz))
    work_s_NC = block.cost_s_NC.copy()
    work_s_NC[:, 2] -= row_s_WN.sum(axis=0)
    row_bits_WN = np.ascontiguousarray(row_s_WN * rate_WN)
    return Links(work_s_NC, row_bits_WN, np.ascontiguousarray(snr_hz_WN), float(air.bandwidth_hz))


@inlined
def work_s(links: Links, device: int, rows: int, experts: int) -> float:
    """Seconds of a device's round that no band makes shorter."""
    work_s_C = links.work_s_NC[device]
    seconds: float = work_s_C[0] + experts * work_s_C[1] + rows * work_s_C[2]
    return seconds if rows > 0 else 0.0


@inlined
def air_and_slope_s(links: Links, device: int, rows: int, share: float) -> tuple[float, float]:
    """Seconds of the rows on the air with a share of the band, and how many fewer per relative growth of the share."""
    air_s, slope_s, band_hz = 0.0, 0.0, share * links.bandwidth_hz
    for way in range(len(links.row_bits_WN)):
        bits = rows * links.row_bits_WN[way, device]
        if bits > 0:
            rate, gain, _ = rate_gain_curve(band_hz, links.snr_hz_WN[way, device])
            air_s += bits / rate
            slope_s += bits / rate * gain * band_hz / rate
    return air_s, slope_s


@inlined
def allocated_s(links: Links, rows_N: Ints, experts_N: Ints, share_N: Floats) -> float:
    """The block's seconds under the best shares of the band, which share_N becomes; it holds where to start."""
    waiting, fixed_s_N = 0, np.empty(len(rows_N))
    for device in range(len(rows_N)):
        fixed_s_N[device] = work_s(links, device, rows_N[device], experts_N[device])
        waiting += rows_N[device] > 0 and links.row_bits_WN[0, device] == 0
    left = 1 - waiting / len(rows_N)
    bits_WN = links.row_bits_WN * rows_N
    seconds: float = least_max_shares(fixed_s_N, bits_WN, links.snr_hz_WN, left * links.bandwidth_hz, share_N)
    share_N *= left
    return seconds


@native(
    *LINKS, read(types.int64, 1), read(types.int64, 1), read(types.int64, 1), types.float64, write(types.float64, 1)
)
def least_shares(
    work_s_NC: Floats,
    row_bits_WN: Floats,
    snr_hz_WN: Floats,
    bandwidth_hz: float,
    device_M: Ints,
    rows_M: Ints,
    experts_M: Ints,
    within_s: float,
    share_M: Floats,
) -> int:
    """The least share of the band with which each load is done in time; infinite where the whole band would not do.

    Time on the air is concave in 1 / share: Newton's method, from the whole band on, approaches it and never passes it.
    """
    links = Links(work_s_NC, row_bits_WN, snr_hz_WN, bandwidth_hz)
    for load in range(len(device_M)):
        device, rows, share = device_M[load], rows_M[load], 1.0
        air_s, slope_s = air_and_slope_s(links, device, rows, share)
        allowed_s = within_s - work_s(links, device, rows, experts_M[load])
        if rows == 0:
            share = 0.0
        elif allowed_s < air_s:
            share = np.inf
        elif air_s == 0:
            share = 1 / len(work_s_NC)
        else:
            for _ in range(MOST_PASSES):
                growth = (allowed_s - air_s) / slope_s
                share /= 1 + growth
                if growth <= CLOSE:
                    break
                air_s, slope_s = air_and_slope_s(links, device, rows, share)
        share_M[load] = share
    return 0
