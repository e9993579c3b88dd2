from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from firmware_boards import Spoken, orin_nano, orin_nano_says, samples, write
from hypothesis import given
from hypothesis import strategies as st

from firmware_setup.machine import Answer, Machine
from firmware_setup.network import (
    POWER_SAVE,
    band_of,
    medium_of,
    parse_interfaces,
    parse_link,
    parse_route,
    read_route,
    read_wifi,
)
from firmware_setup.time_sync import parse_tracking, read_time_sync

LEAF = ["iw_dev", "iw_link", "iw_power_save", "ip_route_get", "chronyc_tracking"]
ALL = [sample["sample"] for topic in LEAF for sample in samples("network.json", topic)]


@pytest.mark.parametrize("sample", samples("network.json", "iw_dev"))
def test_iw_dev_names_its_interfaces(sample: dict[str, Any]) -> None:
    assert [name for name, _ in parse_interfaces(sample["sample"])] == sample["names"]


@pytest.mark.parametrize("sample", samples("network.json", "iw_link"))
def test_iw_link_tells_frequency_signal_and_rate(sample: dict[str, Any]) -> None:
    assert list(parse_link(sample["sample"])) == sample["means"]


@pytest.mark.parametrize("sample", samples("network.json", "ip_route_get"))
def test_ip_route_tells_interface_own_address_and_gateway(sample: dict[str, Any]) -> None:
    assert list(parse_route(sample["sample"])) == sample["means"]


@pytest.mark.parametrize("sample", samples("network.json", "chronyc_tracking"))
def test_chrony_tells_how_far_the_clock_is_off(sample: dict[str, Any]) -> None:
    known = parse_tracking(sample["sample"])
    assert known is not None
    assert {name: pytest.approx(value) for name, value in sample["means"].items()} == {
        name: getattr(known, name) for name in sample["means"]
    }


@pytest.mark.parametrize("sample", samples("network.json", "iw_power_save"))
def test_iw_tells_power_save(sample: dict[str, Any]) -> None:
    match = POWER_SAVE.search(sample["sample"])
    assert match is not None
    assert (match[1] == "on") is sample["power_save"]


def test_a_boards_wifi_is_read_whole(tmp_path: Path) -> None:
    (wifi,) = read_wifi(Machine(orin_nano(tmp_path), Spoken(orin_nano_says("python"))))
    assert (wifi.interface, wifi.connected, wifi.band, wifi.width_mhz) == ("wlP1p1s0", True, "5 GHz", 80)
    assert (wifi.signal_dbm, wifi.power_save) == (-47, False)


def test_without_iw_the_interface_is_known_and_all_else_is_not(tmp_path: Path) -> None:
    (wifi,) = read_wifi(Machine(orin_nano(tmp_path), Spoken({})))
    assert wifi.interface == "wlP1p1s0"
    assert {value for name, value in vars(wifi).items() if name != "interface"} == {None}


def test_neither_network_nor_station_is_in_what_is_told(tmp_path: Path) -> None:
    told = repr(read_wifi(Machine(orin_nano(tmp_path), Spoken(orin_nano_says("python")))))
    assert "02:00" not in told
    assert "lab" not in told


@pytest.mark.parametrize(
    ("frequency_mhz", "band"), [(2412, "2.4 GHz"), (5180, "5 GHz"), (5955, "6 GHz"), (60480, "60 GHz"), (900, None)]
)
def test_a_frequency_lies_in_its_band(frequency_mhz: int, band: str | None) -> None:
    assert band_of(frequency_mhz) == band


def test_the_medium_of_an_interface_is_what_the_kernel_says(tmp_path: Path) -> None:
    net = "sys/class/net"
    files = {f"{net}/wlan0/wireless/x": "", f"{net}/enP8p1s0/device/x": "", f"{net}/docker0/x": ""}
    machine = Machine(write(tmp_path, files), Spoken({}))
    mediums = [medium_of(machine, name) for name in ("wlan0", "enP8p1s0", "docker0", "lo")]
    assert mediums == ["wifi", "ethernet", "virtual", "loopback"]


def test_a_base_station_is_found_by_name(tmp_path: Path) -> None:
    said = {
        **orin_nano_says("python"),
        "getent ahosts -- bs.lab": "192.0.2.9       STREAM bs.lab\n192.0.2.9       DGRAM  \n",
    }
    route = read_route(Machine(orin_nano(tmp_path), Spoken(said)), "bs.lab")
    assert (route.address, route.interface, route.medium, route.source) == (
        "192.0.2.9",
        "wlP1p1s0",
        "wifi",
        "192.0.2.20",
    )


def test_a_base_station_without_an_address_or_a_way_is_an_error_in_one_line(tmp_path: Path) -> None:
    machine = Machine(tmp_path, Spoken({"ip": Answer(2, "RTNETLINK answers: Network is unreachable\n")}))
    assert "no address" in (read_route(machine, "bs.lab").error or "")
    assert read_route(machine, "192.0.2.9").error == "RTNETLINK answers: Network is unreachable"


def test_a_name_that_looks_like_an_option_is_no_option(tmp_path: Path) -> None:
    commands = Spoken({})
    read_route(Machine(tmp_path, commands), "--help")
    assert commands.asked == ["getent ahosts -- --help"]


def test_chrony_that_is_not_there_says_so(tmp_path: Path) -> None:
    time = read_time_sync(Machine(tmp_path, Spoken({})))
    assert (time.synchronised, time.why_unknown) == (None, "chronyc is not installed")
    refused = Machine(tmp_path, Spoken({"chronyc": Answer(1, "506 Cannot talk to daemon\n")}))
    assert read_time_sync(refused).why_unknown == "506 Cannot talk to daemon"


@given(st.sampled_from(ALL), st.data())
def test_truncated_answers_are_read_without_an_error(text: str, data: st.DataObject) -> None:
    read_all(text[: data.draw(st.integers(0, len(text)))])


@given(st.text())
def test_hostile_answers_are_read_without_an_error(text: str) -> None:
    read_all(text)


@given(st.lists(st.text(alphabet="0123456789.e-naif", max_size=12), min_size=13, max_size=13))
def test_hostile_numbers_of_chrony_give_a_finite_offset_or_none(fields: list[str]) -> None:
    known = parse_tracking(",".join([*fields, "Normal"]))
    assert known is None or known.abs_offset_s is None or 0 <= known.abs_offset_s < float("inf")


def read_all(text: str) -> None:
    for name, section in parse_interfaces(text):
        assert name
        assert len(section) <= len(text)
    _, frequency_mhz, signal_dbm, _ = parse_link(text)
    assert frequency_mhz is None or frequency_mhz < 100_000
    assert signal_dbm is None or abs(signal_dbm) < 1000
    interface, _, _ = parse_route(text)
    assert interface is None or "/" not in interface
    parse_tracking(text)
