"""What a base station knows of the links whose band it shares out: its channel state information."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from testbed.policies.bandwidth import rates_bits_per_s, spectral_snr_hz
from testbed.policies.base import Air, FloatArray


class EstimatedCsi:
    """From measured rates: row_bits over the estimated air time of a row at the even split, solved for snr_hz."""

    def __init__(self, bandwidth_hz: float, devices: int, row_bits_down: float, row_bits_up: float) -> None:
        self._bandwidth_hz, self._even_hz = bandwidth_hz, bandwidth_hz / devices
        self._row_bits_W1 = np.array([[row_bits_down], [row_bits_up]])

    def air(self, row_s_WN: FloatArray) -> Air:
        """row_s_WN: estimated seconds of a row on the air, down and up, at the even split; NaN if unknown."""
        return Air(self._bandwidth_hz, spectral_snr_hz(self._row_bits_W1, row_s_WN, self._even_hz), row_s_WN)


class ReportedCsi:
    """As devices report it: snr_hz is told, once per prompt, and may be in error.

    A row then takes its bits at the rate that was told, whatever earlier ones took: what was measured lags behind.
    """

    def __init__(self, bandwidth_hz: float, devices: int, row_bits_down: float, row_bits_up: float) -> None:
        self._bandwidth_hz, self._even_N = bandwidth_hz, np.full(devices, 1 / devices)
        self._row_bits_W1 = np.array([[row_bits_down], [row_bits_up]])
        self._snr_hz_WN = np.full((2, devices), np.nan)

    def report(self, snr_hz_WN: FloatArray) -> None:
        self._snr_hz_WN = snr_hz_WN

    def air(self, row_s_WN: FloatArray) -> Air:
        measured = Air(self._bandwidth_hz, self._snr_hz_WN, row_s_WN)
        told_s_WN = self._row_bits_W1 / rates_bits_per_s(measured, self._even_N)
        return replace(measured, row_s_WN=told_s_WN)


class ShapedCsi:
    """Of real links whose rates are shaped: a device that is given B bit/s of the total carries B. No spectrum."""

    def __init__(self, bits_per_s: float) -> None:
        self._bits_per_s = bits_per_s

    def air(self, row_s_WN: FloatArray) -> Air:
        return Air(self._bits_per_s, np.full(row_s_WN.shape, np.inf), row_s_WN)


Csi = EstimatedCsi | ReportedCsi | ShapedCsi
