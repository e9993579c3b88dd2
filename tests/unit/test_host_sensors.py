"""Temperatures, clocks and throttling out of a /sys that is written by hand (synthetic)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_node.host_sensors import HostSensors, plain_name, zone_name
from testbed.wire.figures import is_figure


def write(root: Path, files: dict[str, str | bytes]) -> HostSensors:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return HostSensors(root)


def zone(place: int, kind: str, milli_c: str | bytes) -> dict[str, str | bytes]:
    folder = f"class/thermal/thermal_zone{place}"
    return {f"{folder}/type": f"{kind}\n", f"{folder}/temp": milli_c}


def cooling(place: int, kind: str, state: str) -> dict[str, str | bytes]:
    folder = f"class/thermal/cooling_device{place}"
    return {f"{folder}/type": f"{kind}\n", f"{folder}/cur_state": f"{state}\n"}


def clock(policy: int, khz: str) -> dict[str, str | bytes]:
    return {f"devices/system/cpu/cpufreq/policy{policy}/scaling_cur_freq": f"{khz}\n"}


def test_a_machine_without_sensors_tells_nothing(tmp_path: Path) -> None:
    assert HostSensors(tmp_path).read() == {}


@pytest.mark.parametrize("kind", ["cpu-thermal", "CPU-therm", "cpu_thermal", "cpu"])
def test_zones_of_every_jetpack_have_the_names_that_jtop_gives_them(kind: str) -> None:
    assert zone_name(kind) == "cpu"


def test_zones_are_told_in_celsius_and_the_hottest_of_one_name(tmp_path: Path) -> None:
    zones = zone(0, "cpu-thermal", "49468\n") | zone(1, "acpitz", "27800\n") | zone(2, "acpitz", "29800\n")
    assert write(tmp_path, zones).read() == {"cpu_c": 49.468, "acpitz_c": 29.8}


@pytest.mark.parametrize("content", ["-256000\n", "2147483647\n", "", "hot\n", b"\xff\xfe", "nan\n", "1e5\n"])
def test_a_zone_that_is_off_or_says_nonsense_is_unknown(tmp_path: Path, content: str | bytes) -> None:
    assert write(tmp_path, zone(0, "cv0-thermal", content)).read() == {"cv0_c": None}


def test_a_zone_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    sensors = write(tmp_path, zone(0, "cv0-thermal", "1000\n"))
    (tmp_path / "class/thermal/thermal_zone0/temp").unlink()
    assert sensors.read() == {"cv0_c": None}


def test_the_clock_is_the_mean_over_clusters_in_megahertz(tmp_path: Path) -> None:
    assert write(tmp_path, clock(0, "1344000") | clock(4, "1728000")).read() == {"cpu_mhz": 1536.0}


def test_a_cluster_that_is_switched_off_does_not_count(tmp_path: Path) -> None:
    assert write(tmp_path, clock(0, "1344000") | clock(4, "<unknown>")).read() == {"cpu_mhz": 1344.0}
    assert write(tmp_path / "all", clock(0, "<unknown>")).read() == {"cpu_mhz": None}


def test_a_clock_that_is_slowed_for_heat_is_told_and_a_fan_that_turns_is_not(tmp_path: Path) -> None:
    devices = cooling(0, "pwm-fan", "3") | cooling(1, "cpufreq-cpu0", "0")
    assert write(tmp_path, devices).read() == {"throttled": 0.0}
    assert write(tmp_path, cooling(1, "cpufreq-cpu0", "2")).read() == {"throttled": 1.0}
    assert write(tmp_path / "fan", cooling(0, "pwm-fan", "3")).read() == {}


@given(st.text(min_size=1, max_size=300))
def test_whatever_a_sensor_is_called_its_name_is_one_that_is_logged(name: str) -> None:
    assert not plain_name(name) or is_figure(f"{plain_name(name)}_c")
