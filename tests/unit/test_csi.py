"""What a base station takes its links to be: from what it measured, from what it is told, or as rates are shaped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from testbed.latency.csi import EstimatedCsi, ReportedCsi, ShapedCsi
from testbed.latency.model import rate_bits_per_s
from testbed.policies.bandwidth import rate_ratio, rates_bits_per_s
from testbed.policies.base import FloatArray

BAND_HZ, DEVICES, DOWN_BITS, UP_BITS = 100e6, 4, 33_000.0, 17_000.0
EVEN_HZ = BAND_HZ / DEVICES
SNR_HZ_WN = hnp.arrays(float, (2, DEVICES), elements=st.floats(5, 12).map(lambda power: 10.0**power))


def row_s_of(snr_hz_WN: FloatArray, band_hz: float = EVEN_HZ) -> FloatArray:
    """Seconds of a row on links of that quality."""
    return np.array([[DOWN_BITS], [UP_BITS]]) / rate_bits_per_s(band_hz, snr_hz_WN, 1.0, 1.0)


@given(SNR_HZ_WN)
def test_measured_rates_tell_what_the_links_are(snr_hz_WN: FloatArray) -> None:
    row_s_WN = row_s_of(snr_hz_WN)
    air = EstimatedCsi(BAND_HZ, DEVICES, DOWN_BITS, UP_BITS).air(row_s_WN)
    np.testing.assert_allclose(air.snr_hz_WN, snr_hz_WN, rtol=1e-9)
    assert air.bandwidth_hz == BAND_HZ
    assert air.row_s_WN is row_s_WN


@given(SNR_HZ_WN, hnp.arrays(float, DEVICES, elements=st.floats(0.01, 1)))
def test_estimated_links_have_the_true_links_rates_under_any_shares(
    snr_hz_WN: FloatArray, weight_N: FloatArray
) -> None:
    share_N = weight_N / weight_N.sum()
    air = EstimatedCsi(BAND_HZ, DEVICES, DOWN_BITS, UP_BITS).air(row_s_of(snr_hz_WN))
    true_WN = rate_bits_per_s(share_N * BAND_HZ, snr_hz_WN, 1.0, 1.0)
    np.testing.assert_allclose(rates_bits_per_s(air, share_N), true_WN, rtol=1e-9)


def test_a_link_that_was_never_measured_is_not_known() -> None:
    row_s_WN = row_s_of(np.full((2, DEVICES), 1e8))
    row_s_WN[0, 1], row_s_WN[1, 2] = np.nan, 0.0
    air = EstimatedCsi(BAND_HZ, DEVICES, DOWN_BITS, UP_BITS).air(row_s_WN)
    assert np.isnan(air.snr_hz_WN).tolist() == [[False, True, False, False], [False, False, True, False]]


def test_what_is_told_is_believed_whatever_was_measured() -> None:
    csi, row_s_WN = ReportedCsi(BAND_HZ, DEVICES, DOWN_BITS, UP_BITS), np.full((2, DEVICES), 0.001)
    assert np.isnan(csi.air(row_s_WN).snr_hz_WN).all()
    for told in (1e7, 1e9):
        csi.report(np.full((2, DEVICES), told))
        air = csi.air(row_s_WN)
        assert (air.snr_hz_WN == told).all()
        np.testing.assert_allclose(air.row_s_WN, row_s_of(np.full((2, DEVICES), told)))
        assert air.bandwidth_hz == BAND_HZ


def test_a_shaped_link_carries_what_it_is_given() -> None:
    share_N = np.array([0.1, 0.2, 0.3, 0.4])
    air = ShapedCsi(8e6).air(np.full((2, DEVICES), np.nan))
    assert rates_bits_per_s(air, share_N) == pytest.approx(np.tile(8e6 * share_N, (2, 1)))
    assert rate_ratio(air, share_N) == pytest.approx(np.tile(DEVICES * share_N, (2, 1)))
