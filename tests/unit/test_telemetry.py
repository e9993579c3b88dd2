"""Figures of a heartbeat. The board's are tested on output captured from an Orin Nano (JetPack 6.2, jtop 4)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import until

from jetson_node.host_sensors import HostSensors
from jetson_node.jtop_sampler import clocks_of, sample_line
from jetson_node.telemetry import BoardSample, Telemetry, board_figures, sample_of_line
from testbed.wire.figures import HOST, is_figure
from testbed.wire.messages import Heartbeat, decode_from_node, encode

# fmt: off
CAPTURED = {
    "CPU1": 18, "CPU2": 39, "RAM": 0.4574121443512036, "SWAP": 0.0, "EMC": 0, "GPU": 4.8, "APE": "OFF", "NVDEC": "OFF",
    "Fan pwmfan0": 26.274509803921568, "Temp cpu": 46.062, "Temp cv0": -256, "Temp cv1": -256, "Temp gpu": 46.406,
    "Temp soc0": 45.875, "Temp tj": 47.906, "Power VDD_CPU_GPU_CV": 1064, "Power VDD_SOC": 1540, "Power TOT": 5133,
    "jetson_clocks": "OFF", "nvp model": "25W",
}
CAPTURED_POWER: dict[str, Any] = {
    "rail": {
        "VDD_CPU_GPU_CV": {"volt": 4928, "curr": 216, "warn": 32760, "crit": 32760, "power": 1064,
                           "online": True, "avg": 806},
        "VDD_SOC": {"volt": 4936, "curr": 312, "warn": 32760, "crit": 32760, "power": 1540,
                    "online": True, "avg": 1524},
    },
    "tot": {
        "volt": 4936, "curr": 1040, "warn": 5232, "crit": 5232, "power": 5133, "online": True, "avg": 4800,
        "name": "VDD_IN",
    },
}
CAPTURED_GPU: dict[str, Any] = {
    "gpu": {
        "type": "integrated", "status": {"railgate": False, "tpc_pg_mask": False, "3d_scaling": True, "load": 4.8},
        "freq": {"governor": "nvhost_podgov", "cur": 306000, "max": 1020000, "min": 306000, "GPC": [305981]},
        "power_control": "auto",
    },
}
CAPTURED_MEMORY: dict[str, Any] = {
    "RAM": {"tot": 3688892, "used": 1687344, "free": 737636},
    "EMC": {"cur": 2133000, "max": 3199000, "min": 204000, "override": 0, "val": 0, "online": True},
}
CAPTURED_FAN: dict[str, Any] = {
    "pwmfan": {"speed": [26.274509803921568], "rpm": [1145], "profile": "quiet", "governor": "cont",
               "control": "close_loop"},
}
# fmt: on
CLOCKS = clocks_of(CAPTURED_GPU, CAPTURED_MEMORY, CAPTURED_FAN)


def test_a_captured_board_gives_gpu_load_temperatures_and_power_with_their_units() -> None:
    figures = board_figures(CAPTURED)
    assert figures["gpu_percent"] == 4.8
    assert figures["gpu_c"] == 46.406
    assert figures["tot_w"] == 5.133
    assert figures["vdd_soc_w"] == 1.54


def test_captured_clocks_and_fans_have_their_units() -> None:
    figures = board_figures(CAPTURED | CLOCKS)
    assert (figures["gpu_mhz"], figures["emc_mhz"], figures["emc_percent"]) == (306.0, 2133.0, 0)
    assert (figures["fan_pwmfan0_rpm"], figures["fan_pwmfan0_percent"]) == (1145, pytest.approx(26.27, abs=0.01))


@pytest.mark.parametrize(
    ("gpu", "memory", "fan"),
    [
        ({}, {}, {}),
        (None, None, None),
        ({"gpu": {"freq": {"cur": None}}}, {"EMC": None}, {"fan": {}}),
        ({"gpu": 5}, [1], {"fan": {"rpm": "fast"}}),
    ],
)
def test_clocks_that_jtop_does_not_tell_are_left_out(gpu: object, memory: object, fan: object) -> None:
    assert clocks_of(gpu, memory, fan) == {}


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


@given(st.dictionaries(st.text(max_size=300), st.floats(), max_size=200), st.text(max_size=300))
def test_whatever_a_board_names_its_sensors_the_heartbeat_fits(stats: dict[str, Any], rail: str) -> None:
    """Also one with more sensors than a heartbeat carries; what accounts for energy is never crowded out."""
    sensors = {f"Temp {name}": value for name, value in stats.items()} | {"Power TOT": 5133}
    telemetry = Telemetry()
    telemetry.close()
    telemetry._sampler = None
    telemetry._board = BoardSample(time.monotonic_ns(), rail, sensors | {f"Fan {name}": 1 for name in stats}, {})
    figures = telemetry.figures()
    sent = decode_from_node(encode(Heartbeat(1, figures)))
    assert isinstance(sent, Heartbeat)
    assert figures["tot_w"] == 5.133
    assert {"board_age_s", "rss_bytes", f"tot_rail:{rail[:64]}"} <= figures.keys()


def test_every_captured_figure_has_a_name_that_the_base_station_takes() -> None:
    assert all(is_figure(name) for name in board_figures(CAPTURED | CLOCKS))
    telemetry = Telemetry()
    figures = telemetry.figures()
    telemetry.close()
    assert {name for name in figures if not is_figure(name)} == {"host_age_s"}


def test_the_machine_is_read_once_a_second_and_figures_tell_their_age(tmp_path: Path) -> None:
    class Counting(HostSensors):
        reads = 0

        def read(self) -> dict[str, float | None]:
            self.reads += 1
            return {"cpu_mhz": float(self.reads)}

    telemetry = Telemetry(sensors := Counting(tmp_path))
    began_s = time.monotonic()
    first, second = telemetry.figures(), telemetry.figures()
    spent_s = time.monotonic() - began_s
    telemetry.close()
    assert sensors.reads <= 1 + spent_s / 0.95
    assert first["host_age_s"] == 0
    assert second["cpu_mhz"] == 1 or spent_s > 0.95
    assert 0 <= (second["host_age_s"] or 0) <= spent_s


def test_a_board_tells_its_temperatures_itself(tmp_path: Path) -> None:
    class Warm(HostSensors):
        def read(self) -> dict[str, float | None]:
            return {"cpu_c": 20.0, "soc_c": 21.0, "cpu_mhz": 1000.0}

    telemetry = Telemetry(Warm(tmp_path))
    telemetry.close()
    telemetry._sampler = None
    assert telemetry.figures()["soc_c"] == 21.0
    telemetry._board = BoardSample(time.monotonic_ns(), "VDD_IN", CAPTURED, CLOCKS)
    figures = telemetry.figures()
    assert (figures["cpu_c"], figures["cpu_mhz"]) == (46.062, 1000.0)
    assert "soc_c" not in figures


def test_this_process_reports_memory_and_load_without_a_board() -> None:
    telemetry = Telemetry()
    figures = telemetry.figures()
    telemetry.close()
    assert (figures["rss_bytes"] or 0) > 1_000_000
    assert (figures["memory_available_bytes"] or 0) > 0
    assert figures["load_1m"] is not None
    assert set(HOST) - figures.keys() <= {"cpu_mhz", "throttled"}


def test_importing_the_node_never_imports_jtop() -> None:
    code = "import sys, json, jetson_node.telemetry, jetson_node.worker; print(json.dumps('jtop' in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(printed.stdout) is False


def sampled(power: dict[str, Any], sampled_ns: int = 5_000_000_000) -> dict[str, float | None]:
    """Figures 0.25 s after the sample."""
    sample = sample_of_line(sample_line(CAPTURED, power, CLOCKS, sampled_ns).encode())
    assert sample is not None
    return sample.figures(sampled_ns + 250_000_000)


def test_a_captured_sample_tells_its_age_and_the_rail_of_its_total_power() -> None:
    figures = sampled(CAPTURED_POWER)
    assert figures["gpu_mhz"] == 306
    assert figures["tot_w"] == 5.133
    assert figures["board_age_s"] == 0.25
    assert [name for name in figures if name.startswith("tot_rail")] == ["tot_rail:VDD_IN"]


def test_a_board_that_names_no_rail_for_its_total_has_a_sum_of_rails() -> None:
    """Synthetic: the captured figures without the name, as jtop gives them where it adds rails up."""
    total = {key: value for key, value in CAPTURED_POWER["tot"].items() if key != "name"}
    assert "tot_rail:sum" in sampled({**CAPTURED_POWER, "tot": total})


@pytest.mark.parametrize("power", [{}, {"rail": {}, "tot": {}}])
def test_a_board_without_power_names_no_rail(power: dict[str, Any]) -> None:
    assert not any(name.startswith("tot_rail") for name in sampled(power))


def test_what_has_no_plain_value_does_not_travel() -> None:
    line = sample_line({"time": object(), "GPU": 1.5}, {}, {}, 1)
    assert json.loads(line) == {"sampled_ns": 1, "total_rail": None, "stats": {"GPU": 1.5}, "clocks": {}}


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"3", b"{}", b'{"sampled_ns": 1.5, "total_rail": 0, "stats": []}'])
def test_a_line_that_is_no_sample_gives_none(line: bytes) -> None:
    assert sample_of_line(line) is None


SYNTHETIC_JTOP = """
import time

class JtopException(Exception):
    pass

class jtop:
    gpu = {"gpu": {"freq": {"cur": 306000}}}
    memory, fan = {"EMC": {"cur": 2133000}}, {}
    power = {"tot": {"power": 5133, "name": "VDD_IN"}}
    stats = {"Power TOT": 5133}

    def __init__(self, interval):
        self.samples = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ok(self):
        self.samples += 1
        while self.samples > 1:
            time.sleep(1)
        return True
"""


def test_a_sampler_that_is_stuck_grows_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic: a service that gives one sample and then hangs."""
    (tmp_path / "jtop.py").write_text(SYNTHETIC_JTOP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began_s = time.monotonic()
    telemetry = Telemetry()
    try:
        first = until(lambda: figures if "tot_w" in (figures := telemetry.figures()) else None, 20, "a sample")
        second = telemetry.figures()
    finally:
        telemetry.close()
    assert first["tot_w"] == second["tot_w"] == 5.133
    assert 0 < (first["board_age_s"] or 0) < (second["board_age_s"] or 0) < time.monotonic() - began_s
    assert "tot_rail:VDD_IN" in first
    assert (first["gpu_mhz"], first["emc_mhz"]) == (306.0, 2133.0)
