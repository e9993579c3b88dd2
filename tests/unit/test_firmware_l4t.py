from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from firmware_boards import Spoken, orin_nano, samples, write
from hypothesis import given
from hypothesis import strategies as st

from firmware_setup.l4t import (
    JETPACK_OF_L4T,
    UNKNOWN,
    board_of,
    jetpack_of,
    major_of,
    package_versions,
    read_board,
    read_software,
    release_of,
)
from firmware_setup.machine import Machine


@pytest.mark.parametrize("sample", samples("releases.json", "nv_tegra_release"))
def test_every_sample_of_nv_tegra_release_tells_its_l4t_and_jetpack(sample: dict[str, Any]) -> None:
    assert release_of(sample["sample"]) == sample["l4t"]
    assert jetpack_of(sample["l4t"]) == sample["jetpack"]


@pytest.mark.parametrize("sample", samples("releases.json", "nvidia_l4t_core"))
def test_every_sample_of_dpkg_tells_its_l4t(tmp_path: Path, sample: dict[str, Any]) -> None:
    machine = Machine(tmp_path, Spoken({"dpkg-query --show nvidia-l4t-core": sample["sample"]}))
    software = read_software(machine)
    assert software.l4t == (sample["l4t"] or UNKNOWN)
    assert software.l4t_source == ("dpkg" if sample["l4t"] else UNKNOWN)
    assert software.jetpack == (sample["jetpack"] or UNKNOWN)


@pytest.mark.parametrize("sample", samples("releases.json", "nvidia_jetpack"))
def test_every_sample_of_the_jetpack_package_tells_its_version(sample: dict[str, Any]) -> None:
    assert package_versions(sample["sample"]) == {"nvidia-jetpack": sample["version"]}


@pytest.mark.parametrize("sample", samples("device_trees.json", "compatible"))
def test_every_sample_of_a_device_tree_names_its_module(tmp_path: Path, sample: dict[str, Any]) -> None:
    tree = {"proc/device-tree/compatible": sample["sample"], "proc/device-tree/model": sample["model"]}
    board = read_board(Machine(write(tmp_path, tree), Spoken({})))
    assert (board.part, board.carrier, board.soc) == (sample["part"], sample["carrier"], sample["soc"])
    assert board.super_mode is sample["super_mode"]
    assert board.module != UNKNOWN
    assert board.model == sample["model"].rstrip("\0")


@pytest.mark.parametrize("sample", samples("device_trees.json", "model"))
def test_every_sample_of_a_model_is_read_without_its_end_mark(tmp_path: Path, sample: dict[str, Any]) -> None:
    board = read_board(Machine(write(tmp_path, {"proc/device-tree/model": sample["sample"]}), Spoken({})))
    assert board.model == sample["sample"][:-1]
    assert board.part == UNKNOWN  # carrier vendors change the model: it identifies nothing


@pytest.mark.parametrize("sample", samples("device_trees.json", "nv_boot_control"))
def test_how_a_module_was_flashed_tells_whether_it_has_super_mode(sample: dict[str, Any]) -> None:
    assert (
        board_of("any", ["nvidia,p3767-0005", "nvidia,tegra234"], sample["sample"]).super_mode is sample["super_mode"]
    )


def test_a_device_tree_that_a_container_shows_elsewhere_is_found(tmp_path: Path) -> None:
    write(tmp_path, {"sys/firmware/devicetree/base/compatible": b"nvidia,p3767-0000\0nvidia,tegra234\0"})
    assert read_board(Machine(tmp_path, Spoken({}))).module == "Jetson Orin NX 16GB"


def test_packages_say_more_than_the_file_which_a_partial_upgrade_leaves_behind(tmp_path: Path) -> None:
    said = {"dpkg-query --show nvidia-l4t-core": "nvidia-l4t-core\t36.4.7-20250918154033\n"}
    assert read_software(Machine(orin_nano(tmp_path), Spoken(said))).l4t == "36.4.7"


def test_without_packages_the_file_tells(tmp_path: Path) -> None:
    software = read_software(Machine(orin_nano(tmp_path), Spoken({})), "3.10.12")
    assert (software.l4t, software.l4t_source, software.jetpack) == ("36.4.3", "nv_tegra_release", "6.2")
    assert (software.jetpack_package, software.kernel, software.python) == (None, "5.15.148-tegra", "3.10.12")


def test_a_machine_that_is_no_jetson_is_unknown_and_no_error(tmp_path: Path) -> None:
    machine = Machine(tmp_path, Spoken({}))
    assert set(vars(read_board(machine)).values()) == {UNKNOWN, None}
    assert read_software(machine).l4t == read_software(machine).jetpack == UNKNOWN


def test_every_release_of_the_table_has_a_major_number() -> None:
    assert {major_of(l4t) for l4t in JETPACK_OF_L4T} == {32, 35, 36, 38, 39}
    assert major_of(UNKNOWN) is None


@given(st.sampled_from(samples("releases.json", "nv_tegra_release")), st.data())
def test_a_truncated_release_file_is_its_release_or_unknown(sample: dict[str, Any], data: st.DataObject) -> None:
    text = sample["sample"]
    cut = text[: data.draw(st.integers(0, len(text)))]
    assert release_of(cut) in (UNKNOWN, sample["l4t"])


@given(st.binary(max_size=300), st.binary(max_size=300), st.text(max_size=200))
def test_hostile_files_are_read_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, compatible: bytes, release: bytes, said: str
) -> None:
    root = write(
        tmp_path_factory.getbasetemp() / "hostile-board",
        {
            "proc/device-tree/compatible": compatible,
            "proc/device-tree/model": compatible,
            "etc/nv_tegra_release": release,
        },
    )
    machine = Machine(root, Spoken({"dpkg-query": said}))
    board = read_board(machine)
    assert all(value is None or isinstance(value, bool) or value.isprintable() for value in vars(board).values())
    assert major_of(read_software(machine).l4t) is None or read_software(machine).l4t != UNKNOWN
