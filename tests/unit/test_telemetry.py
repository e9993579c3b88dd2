"""Figures of a heartbeat. The board's are tested on output captured from an Orin Nano (JetPack 6.2, jtop 4)."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_node.telemetry import Telemetry, board_figures

# fmt: off
CAPTURED = {
    "CPU1": 18, "CPU2": 39, "RAM": 0.4574121443512036, "SWAP": 0.0, "EMC": 0, "GPU": 4.8, "APE": "OFF", "NVDEC": "OFF",
    "Fan pwmfan0": 26.274509803921568, "Temp cpu": 46.062, "Temp cv0": -256, "Temp cv1": -256, "Temp gpu": 46.406,
    "Temp soc0": 45.875, "Temp tj": 47.906, "Power VDD_CPU_GPU_CV": 1064, "Power VDD_SOC": 1540, "Power TOT": 5133,
    "jetson_clocks": "OFF", "nvp model": "25W",
}
# fmt: on


def test_a_captured_board_gives_gpu_load_temperatures_and_power_with_their_units() -> None:
    figures = board_figures(CAPTURED)
    assert figures["gpu_percent"] == 4.8
    assert figures["gpu_c"] == 46.406
    assert figures["tot_w"] == 5.133
    assert figures["vdd_soc_w"] == 1.54


def test_a_sensor_that_is_offline_is_unknown_and_not_a_temperature() -> None:
    assert board_figures(CAPTURED)["cv0_c"] is None


def test_keys_of_jetpack_5_in_capitals_give_the_same_names() -> None:
    assert board_figures({"Temp CPU": 40.0, "Power 5V": 1000}) == {"cpu_c": 40.0, "5v_w": 1.0}


@pytest.mark.parametrize("value", ["OFF", None, math.nan, math.inf, True])
def test_what_is_no_number_is_unknown(value: object) -> None:
    assert board_figures({"GPU": value, "Temp cpu": value, "Power TOT": value}) == {
        "gpu_percent": None,
        "cpu_c": None,
        "tot_w": None,
    }


@given(st.dictionaries(st.text(max_size=20), st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=9))))
def test_whatever_the_board_says_figures_are_finite_or_unknown(stats: dict[str, object]) -> None:
    assert all(value is None or math.isfinite(value) for value in board_figures(stats).values())


def test_this_process_reports_memory_and_load_without_a_board() -> None:
    telemetry = Telemetry()
    figures = telemetry.figures()
    telemetry.close()
    assert (figures["rss_bytes"] or 0) > 1_000_000
    assert (figures["memory_available_bytes"] or 0) > 0
    assert figures["load_1m"] is not None


def test_importing_the_node_never_imports_jtop() -> None:
    code = "import sys, json, jetson_node.telemetry, jetson_node.worker; print(json.dumps('jtop' in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(printed.stdout) is False
