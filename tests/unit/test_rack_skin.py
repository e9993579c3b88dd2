"""A virtual board's files are what the preflight takes for a board, and its tools answer in a device's form."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from firmware_setup.l4t import board_of, jetpack_of, package_versions, release_of
from firmware_setup.power import parse_conf
from testbed.errors import ConfigError
from testbed.fleet.rack import Rack
from testbed.fleet.rack_network import of_rack
from testbed.fleet.rack_plan import RackPlan
from testbed.fleet.rack_skin import DEVICE_TREE, L4T_PACKAGES, MODES, RELEASE, nvpmodel_conf, write_skin


def test_board_and_release_are_known_to_the_preflight(tmp_path: Path) -> None:
    layer, arguments = write_skin(tmp_path / "skin")
    compatible = DEVICE_TREE["compatible"].strip("\0").split("\0")
    found = board_of(DEVICE_TREE["model"].strip("\0"), compatible, (layer / "etc/nv_boot_control.conf").read_text())
    assert (found.part, found.soc, found.super_mode) == ("p3767-0005", "tegra234", True)
    listed = "".join(f"{name}\t{version}\n" for name, version in L4T_PACKAGES.items())
    assert package_versions(listed)["nvidia-l4t-core"].startswith(release_of(RELEASE))
    assert jetpack_of(release_of(RELEASE)) == "6.2.1"
    for argument in arguments[1:]:
        source = re.fullmatch(r"--bind-ro=(.+):/sys/.+", argument)
        assert source is not None
        assert Path(source[1]).is_dir()


def test_every_mode_stands_in_the_boards_own_file_as_the_preflight_reads_it() -> None:
    modes, default = parse_conf(nvpmodel_conf())
    assert [(mode.number, mode.name) for mode in modes] == [(number, name) for number, name, *_ in MODES]
    assert default == 1
    assert modes[1].limits["GPU MAX_FREQ"] == 918000000


@pytest.mark.parametrize("name", ["usr/sbin/nvpmodel", "usr/bin/jetson_clocks", "usr/bin/tegrastats"])
def test_every_tool_is_a_program_that_a_shell_can_parse(tmp_path: Path, name: str) -> None:
    layer, _ = write_skin(tmp_path / "skin")
    tool = layer / name
    assert tool.stat().st_mode & 0o777 == 0o755
    assert subprocess.run(["sh", "-n", str(tool)], check=False, capture_output=True).stderr == b""


def test_a_racks_name_fits_into_the_name_of_an_interface() -> None:
    for name in ("", "Rack", "rack-1", "eightchr", "0rack"):
        with pytest.raises(ConfigError, match="--name"):
            Rack(name)
    assert len(f"wd-{Rack('seventh').name}-63") <= 15


def test_only_what_carries_the_racks_name_is_taken_for_its_own() -> None:
    names = ["lo", "12", "wd-lab", "wd-lab-0", "wd-lab-63", "wd-lab-x", "wd-lab2", "wd-lab2-0", "xwd-lab-0", "wd-"]
    assert of_rack("wd-lab", names) == ["wd-lab", "wd-lab-0", "wd-lab-63"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"devices": 3}', '{"devices": ["a"], "unknown": 1}', "null"])
def test_a_plan_cut_short_is_no_plan(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rack.json"
    file.write_text(text)
    assert RackPlan.read(file) is None
