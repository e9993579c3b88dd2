"""Energy of a block as a model: simulated, from powers and rates that are assumed. Nothing here is measured.

The communication part is power times time on the air, the compute part a device's energy per FLOP times Eq. 4. The
paper minimises delay and gives no energy; what a board really drew is `testbed.experiment.energy`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from testbed.policies.base import FloatArray


class BlockEnergy(NamedTuple):
    """Joule of one block by a model (simulated), per device; NaN where a figure that it needs is unknown."""

    down_j_N: FloatArray  # spent by the base station's transmitter
    compute_j_N: FloatArray  # by the device
    up_j_N: FloatArray  # by the device's transmitter

    @property
    def device_j_N(self) -> FloatArray:
        """What each device itself spends: compute and uplink."""
        return self.compute_j_N + self.up_j_N


def transmit_j(sent_bytes: ArrayLike, power_w: ArrayLike, rate_bits_per_s: ArrayLike) -> FloatArray:
    """Transmit energy in J (model): power_w times the seconds on the air, which is P / R per bit, R as in Eq. 2, 3.

    Only radiated power counts, of one link: links that are on the air at once add up. Receivers and amplifiers' losses
    are left out. Nothing sent costs 0, at any rate; a rate of 0 that has something to send infinity; an unknown (NaN)
    power or rate NaN. Raises ValueError where a figure is below 0.
    """
    sent, power, rate = (np.asarray(value, float) for value in (sent_bytes, power_w, rate_bits_per_s))
    _refuse_negative(bytes=sent, power_w=power, rate_bits_per_s=rate)
    with np.errstate(divide="ignore", invalid="ignore"):
        energy: FloatArray = np.where(sent == 0, 0.0, power * (8 * sent / rate))[()]
    return energy


def compute_j(rows: ArrayLike, flop_per_row: float, joule_per_flop: ArrayLike) -> FloatArray:
    """Compute energy in J (model): rows * flop_per_row (Eq. 4, `expert_flop_per_row`) * joule_per_flop.

    Energy for reading weights is in it only as far as joule_per_flop was taken from a whole expert. 0 rows cost 0, an
    unknown (NaN) joule_per_flop NaN. Raises ValueError where a figure is below 0.
    """
    row_count, per_flop = np.asarray(rows, float), np.asarray(joule_per_flop, float)
    _refuse_negative(rows=row_count, flop_per_row=np.asarray(flop_per_row, float), joule_per_flop=per_flop)
    energy: FloatArray = np.where(row_count == 0, 0.0, row_count * flop_per_row * per_flop)[()]
    return energy


def block_energy_j(
    *,
    rows_N: ArrayLike,
    bytes_WN: ArrayLike,
    rate_bits_per_s_WN: ArrayLike,
    station_power_w: ArrayLike,
    device_power_w: ArrayLike,
    flop_per_row: float,
    joule_per_flop_N: ArrayLike,
) -> BlockEnergy:
    """Energy of one block per device (model, simulated). W: down, up; powers per link, one for all or one per device.

    The downlink is paid with the base station's power, the uplink with the device's. Raises ValueError where a figure
    is below 0, or where the bytes or rates are not those of two ways.
    """
    sent_bytes_WN, rate_WN = np.asarray(bytes_WN, float), np.asarray(rate_bits_per_s_WN, float)
    if len(sent_bytes_WN) != 2 or len(rate_WN) != 2:
        raise ValueError("bytes and rates must have two rows: down, up")
    return BlockEnergy(
        transmit_j(sent_bytes_WN[0], station_power_w, rate_WN[0]),
        compute_j(rows_N, flop_per_row, joule_per_flop_N),
        transmit_j(sent_bytes_WN[1], device_power_w, rate_WN[1]),
    )


def _refuse_negative(**figures: FloatArray) -> None:
    for name, value in figures.items():
        if np.any(value < 0):
            raise ValueError(f"{name} must be 0 or above, not {np.nanmin(value):g}")
