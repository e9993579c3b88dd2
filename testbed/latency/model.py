"""The paper's latency model as formulas (WDMoE, Eq. 2-8): numpy in, numpy out, one number or an array of any shape.

What a base station may predict with. The true channel draws its gains elsewhere and uses the same formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from testbed.policies.base import DROPPED, FloatArray, IntArray

ACTIVATION_FLOP = 4  # eta: exp, add, divide, multiply of one SiLU; the paper leaves it open
THERMAL_NOISE_DBM_PER_HZ = -174.0  # kT at 290 K; the paper leaves N0 open


def path_loss_db(distance_m: ArrayLike, carrier_ghz: float) -> FloatArray:
    """PL(d) = 32.4 + 20 log10(f) + 20 log10(d), f in GHz, d in m: free space (section IV).

    Raises ValueError where a distance or the carrier is not above 0.
    """
    if not (np.all(np.greater(distance_m, 0)) and carrier_ghz > 0):
        raise ValueError("distances and carrier must be above 0")
    loss: FloatArray = 32.4 + 20 * np.log10(carrier_ghz) + 20 * np.log10(distance_m)
    return loss


def amplitude_gain(loss_db: ArrayLike) -> FloatArray:
    """10^(-PL/20): the mean amplitude gain g of a link; its square scales the power."""
    gain: FloatArray = np.power(10.0, np.divide(loss_db, -20))
    return gain


def noise_w_per_hz(noise_figure_db: float) -> float:
    """N0 in W/Hz at a receiver: -174 dBm/Hz plus its noise figure."""
    return float(10 ** ((THERMAL_NOISE_DBM_PER_HZ + noise_figure_db - 30) / 10))


def rate_bits_per_s(bandwidth_hz: ArrayLike, power_w: ArrayLike, gain: ArrayLike, noise_w_per_hz: float) -> FloatArray:
    """B log2(1 + P g^2 / (N0 B)) in bit/s (Eq. 2 down, Eq. 3 up); 0 Hz carry 0 bit/s."""
    band_hz = np.asarray(bandwidth_hz, float)
    snr_hz = np.asarray(power_w) * np.square(gain) / noise_w_per_hz
    with np.errstate(divide="ignore", invalid="ignore"):
        rate: FloatArray = np.where(band_hz > 0, band_hz * np.log1p(snr_hz / band_hz) / np.log(2), 0.0)[()]
    return rate


def expert_flop_per_row(width: int, inner: int, gated: bool = True) -> int:
    """FLOP for one token in one expert (Eq. 4): 4*m*m_h + 2*m_h*m + eta*m_h + m_h with a gate.

    width: m, the length of a row; inner: m_h, the expert's hidden size. Without a gate there is one up projection
    and no product.
    """
    up_projections = 2 if gated else 1
    product = inner if gated else 0
    return up_projections * 2 * width * inner + 2 * inner * width + ACTIVATION_FLOP * inner + product


def row_bits(width: int, bits_per_value: int, added_bytes: float = 0.0) -> float:
    """L_comm = epsilon * m in bit (Eq. 5), plus what a row really adds on the wire: its scale, its share of headers."""
    return bits_per_value * width + 8 * added_bytes


@dataclass(frozen=True, slots=True)
class ComputeModel:
    """Seconds that one device computes for: base + max(rows * row, experts touched * expert); for 0 rows 0."""

    base_s: float
    expert_s: float
    row_s: float

    @classmethod
    def paper(cls, flop_per_row: float, flops_per_s: float) -> ComputeModel:
        """L_comp / C_q for every row and nothing else, as in Eq. 6."""
        return cls(0.0, 0.0, flop_per_row / flops_per_s)

    @classmethod
    def roofline(
        cls,
        flop_per_row: float,
        flops_per_s: float,
        expert_weight_bytes: float,
        memory_bytes_per_s: float,
        base_s: float = 0.0,
    ) -> ComputeModel:
        """Bound by arithmetic or by reading each touched expert's weights once, whichever is slower. Not the paper's:
        one fp16 Mixtral expert takes 1.7-13.8 ms to read at 205-26 GB/s, where Eq. 6 says 0.02-0.75 ms a row."""
        return cls(base_s, expert_weight_bytes / memory_bytes_per_s, flop_per_row / flops_per_s)

    @overload
    def seconds(self, rows: int, experts: int) -> float: ...
    @overload
    def seconds(self, rows: IntArray, experts: IntArray) -> FloatArray: ...
    def seconds(self, rows: int | IntArray, experts: int | IntArray) -> float | FloatArray:
        """rows: to compute; experts: how many different ones they touch. Numbers, or arrays of one shape."""
        work_s: float | FloatArray = np.maximum(np.multiply(rows, self.row_s), np.multiply(experts, self.expert_s))
        return np.greater(rows, 0) * (self.base_s + work_s)


def token_s(
    down_bits: float, up_bits: float, down_bits_per_s: ArrayLike, up_bits_per_s: ArrayLike, compute_s: ArrayLike
) -> FloatArray:
    """One token alone on a device, in s: L_comm / R_down + L_comp / C + L_comm / R_up (Eq. 6).

    The bits are one row's each way, the rest one value per device (N). Propagation is not in Eq. 6: add it outside.
    """
    air_s: FloatArray = np.divide(down_bits, down_bits_per_s) + np.divide(up_bits, up_bits_per_s)
    seconds: FloatArray = air_s + np.asarray(compute_s, float)
    return seconds


def eq8_prompt_s(token_s_N: FloatArray, device_TK: IntArray) -> float:
    """Eq. 7 and 8 for one block: every token waits for the slowest of its kept devices, and their times add up.

    A token with all pairs DROPPED adds 0. NaN if a time it needs is unknown. Over several blocks: the sum.
    Raises ValueError for a device that is not there.
    """
    _check_devices(device_TK, len(token_s_N))
    time_s_TK = np.append(token_s_N, 0.0)[device_TK]  # DROPPED is -1: the appended 0
    return float(time_s_TK.max(axis=1, initial=0.0).sum())


def block_s(token_s_N: FloatArray, device_TK: IntArray) -> float:
    """max_q J_q * t_q: the tokens of a block travel together, and it waits for its slowest device. Not Eq. 8.

    J_q counts the kept pairs (token, expert) of device q, each of which is a row. 0 if nothing is kept, NaN if a time
    it needs is unknown. Raises ValueError for a device that is not there.
    """
    _check_devices(device_TK, len(token_s_N))
    rows_N = np.bincount(device_TK[device_TK != DROPPED], minlength=len(token_s_N))
    busy_N = rows_N > 0
    return float(np.max(rows_N[busy_N] * token_s_N[busy_N], initial=0.0))


def _check_devices(device_TK: IntArray, devices: int) -> None:
    if device_TK.size and not (device_TK.min() >= DROPPED and device_TK.max() < devices):
        raise ValueError(f"device_TK must lie within {DROPPED} (dropped) and {devices - 1}")
