"""Energy by the model: simulated, nothing measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.latency.energy import BlockEnergy, block_energy_j, compute_j, transmit_j
from testbed.latency.model import expert_flop_per_row

BLOCK: dict[str, Any] = {
    "rows_N": [4, 0],
    "bytes_WN": [[4000, 0], [8000, 0]],
    "rate_bits_per_s_WN": [[32e6, np.nan], [1e6, 0.0]],
    "station_power_w": 10.0,
    "device_power_w": [0.2, 0.4],
    "flop_per_row": 1e9,
    "joule_per_flop_N": [2e-12, np.nan],
}


def test_a_transmission_costs_its_power_times_its_time_on_the_air() -> None:
    assert transmit_j(1e6, 10.0, 8e6) == pytest.approx(10.0)  # 1 s at 10 W
    assert transmit_j(1e6 / 8, 0.2, 4e6) / 1e6 == pytest.approx(0.2 / 4e6)  # P / R per bit


def test_computing_costs_the_energy_per_flop_of_equation_4() -> None:
    flop = expert_flop_per_row(4096, 14336)
    assert compute_j(3, flop, 5e-12) == pytest.approx(3 * 352.4e6 * 5e-12, rel=1e-3)


def test_the_station_pays_the_downlink_and_the_device_compute_and_uplink() -> None:
    energy = block_energy_j(**BLOCK)
    assert energy.down_j_N[0] == pytest.approx(10.0 * 1e-3)
    assert energy.up_j_N[0] == pytest.approx(0.2 * 64e-3)
    assert energy.compute_j_N[0] == pytest.approx(4 * 1e9 * 2e-12)
    assert energy.device_j_N[0] == energy.compute_j_N[0] + energy.up_j_N[0]


def test_a_device_without_rows_costs_nothing_whatever_is_unknown_of_it() -> None:
    energy = block_energy_j(**BLOCK)
    assert [part[1] for part in energy] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("unknown", ["rows_N", "bytes_WN", "rate_bits_per_s_WN", "station_power_w", "joule_per_flop_N"])
def test_what_is_unknown_leaves_the_energy_unknown_and_not_0(unknown: str) -> None:
    energy = block_energy_j(**{**BLOCK, unknown: np.full(np.shape(BLOCK[unknown]), np.nan)})
    assert any(np.isnan(part[0]) for part in energy)


def test_rows_for_a_link_without_a_rate_never_end() -> None:
    assert transmit_j(1.0, 0.2, 0.0) == np.inf


@given(st.floats(1, 1e9), st.floats(0.01, 100), st.floats(1e3, 1e10), st.floats(1, 10))
def test_energy_grows_with_bytes_and_power_and_falls_with_the_rate(
    sent: float, power_w: float, rate: float, more: float
) -> None:
    one = transmit_j(sent, power_w, rate)
    assert transmit_j(more * sent, power_w, rate) == pytest.approx(more * one)
    assert transmit_j(sent, more * power_w, rate) == pytest.approx(more * one)
    assert transmit_j(sent, power_w, more * rate) == pytest.approx(one / more)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows_N", [-1, 0]), ("bytes_WN", [[-1, 0], [0, 0]]), ("joule_per_flop_N", [-1e-12, 0]), ("device_power_w", -1)],
)
def test_a_figure_below_0_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="must be 0 or above"):
        block_energy_j(**{**BLOCK, key: value})


def test_bytes_of_one_way_only_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows: down, up"):
        block_energy_j(**{**BLOCK, "bytes_WN": [[1, 2]]})


def test_an_energy_is_three_arrays_of_one_value_per_device() -> None:
    energy = block_energy_j(**BLOCK)
    assert isinstance(energy, BlockEnergy)
    assert [part.shape for part in energy] == [(2,)] * 3
