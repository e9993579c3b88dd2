from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from firmware_boards import FOLDER, Spoken, orin_nano, samples
from hypothesis import given
from hypothesis import strategies as st

from firmware_setup.machine import Answer, Machine
from firmware_setup.power import (
    MOST_MODES,
    are_locked,
    parse_clocks,
    parse_conf,
    parse_mode,
    read_clocks,
    read_power,
)

CONFS = {path.stem: path.read_text() for path in sorted((FOLDER / "power_modes").iterdir())}
NAMES = {
    "agx_orin_64gb": ["MAXN", "MODE_15W", "MODE_30W", "MODE_50W"],
    "orin_nano_8gb_super": ["15W", "25W", "MAXN_SUPER"],
    "orin_nx_16gb": ["MAXN", "10W", "15W", "25W"],
    "thor_t5000": ["MAXN", "120W", "90W", "70W"],
}


@pytest.mark.parametrize("sample", samples("power.json", "nvpmodel"))
def test_every_sample_of_nvpmodel_tells_its_mode(sample: dict[str, Any]) -> None:
    assert parse_mode(sample["sample"]) == (sample["mode"], sample["number"])


@pytest.mark.parametrize("sample", samples("power.json", "jetson_clocks"))
def test_every_sample_of_jetson_clocks_tells_whether_clocks_are_locked(sample: dict[str, Any]) -> None:
    clocks = parse_clocks(sample["sample"])
    assert [clock.name for clock in clocks] == sample["names"]
    assert are_locked(clocks) is sample["locked"]


def test_clocks_are_in_hertz_though_those_of_cores_are_printed_in_kilohertz() -> None:
    cpu, gpu, emc = parse_clocks(samples("power.json", "jetson_clocks")[0]["sample"])
    assert (cpu.least_hz, cpu.most_hz) == (729_600_000, 1_344_000_000)
    assert (gpu.most_hz, emc.now_hz) == (918_000_000, 2_133_000_000)


def test_one_core_that_may_slow_down_is_enough_to_be_unlocked() -> None:
    text = samples("power.json", "jetson_clocks")[1]["sample"]
    assert are_locked(parse_clocks(text + "cpu1:  MinFreq=729600 MaxFreq=2601000 CurrentFreq=2601000\n")) is False


@pytest.mark.parametrize("board", NAMES)
def test_a_boards_modes_come_from_its_own_file(board: str) -> None:
    modes, default_number = parse_conf(CONFS[board])
    assert [mode.name for mode in modes] == NAMES[board]
    assert [mode.number for mode in modes] == list(range(len(modes)))
    assert default_number in (1, 2)


def test_number_0_is_the_fastest_mode_on_one_board_and_the_slowest_on_another() -> None:
    assert parse_conf(CONFS["orin_nx_16gb"])[0][0].name == "MAXN"
    assert parse_conf(CONFS["orin_nano_8gb_super"])[0][0].name == "15W"


def test_a_mode_has_its_limits_and_no_other_modes(tmp_path: Path) -> None:
    power = read_power(Machine(orin_nano(tmp_path), Spoken({"nvpmodel -q": "NV Power Mode: 25W\n1\n"})))
    assert (power.mode, power.mode_number, power.default_number) == ("25W", 1, 1)
    assert power.limits["GPU MAX_FREQ"] == 918_000_000
    assert power.modes[2].limits["GPU MAX_FREQ"] == -1


def test_settings_outside_of_a_mode_belong_to_none() -> None:
    text = "GPU MAX_FREQ 1\n< POWER_MODEL ID=0 NAME=A >\n< PM_CONFIG DEFAULT=0 >\nGPU MAX_FREQ 2\n"
    modes, _ = parse_conf(text)
    assert modes[0].limits == {}


def test_a_board_without_nvpmodel_has_modes_but_is_in_none(tmp_path: Path) -> None:
    power = read_power(Machine(orin_nano(tmp_path), Spoken({})))
    assert (power.mode, power.mode_number, power.limits) == (None, None, {})
    assert len(power.modes) == 3


def test_without_root_it_is_not_known_whether_clocks_are_locked(tmp_path: Path) -> None:
    refused = Answer(1, samples("power.json", "jetson_clocks")[2]["sample"])
    clocks = read_clocks(Machine(tmp_path, Spoken({"jetson_clocks": refused})))
    assert (clocks.locked, clocks.why_unknown) == (None, "jetson_clocks --show needs root")


def test_jetson_clocks_that_does_not_answer_says_why(tmp_path: Path) -> None:
    hung = Answer(None, "jetson_clocks did not answer within 10 s")
    clocks = read_clocks(Machine(tmp_path, Spoken({"jetson_clocks": hung})))
    assert (clocks.locked, clocks.why_unknown) == (None, hung.text)


def test_a_file_with_endless_modes_is_cut() -> None:
    assert len(parse_conf("< POWER_MODEL ID=1 NAME=A >\n" * (MOST_MODES + 9))[0]) == MOST_MODES


@given(st.sampled_from(sorted(CONFS)), st.data())
def test_a_truncated_file_has_the_first_of_its_modes_and_no_others(board: str, data: st.DataObject) -> None:
    text = CONFS[board]
    cut, _ = parse_conf(text[: data.draw(st.integers(0, len(text)))])
    assert [mode.name for mode in cut] == [mode.name for mode in parse_conf(text)[0]][: len(cut)]


@given(
    st.one_of(
        st.text(), st.lists(st.sampled_from(["< POWER_MODEL ID=", "9", " NAME=", "x >", "\n", "GPU MAX_FREQ -1"]))
    )
)
def test_hostile_files_and_answers_are_read_without_an_error(content: str | list[str]) -> None:
    text = "".join(content)
    modes, default_number = parse_conf(text)
    assert all(mode.name.strip() for mode in modes)
    assert default_number is None or default_number >= 0
    assert parse_mode(text)[0] is None or "NV Power Mode:" in text
    assert are_locked(parse_clocks(text)) is None or "MinFreq" in text
