"""Playbooks: syntax, lint, the unit they write, the boards they refuse. Nothing here ran on hardware."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ANSIBLE = Path(__file__).parents[2] / "ansible"
PLAYBOOKS = ("site.yml", "verify.yml", "collect_logs.yml", "teardown.yml")
INVENTORIES = ("lab.yml", "mixed.yml", "virtual_rack.yml")
EXPOSURE_TENTHS = 25
BS = "192.168.50.1"


def tool(name: str) -> str:
    """Of this Python's environment, or of the machine; the test is skipped without it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here (pip install 'wdmoe-testbed[provisioning]')")
    return found


def run(name: str, *arguments: str, folder: Path, ok: bool = True) -> str:
    env = os.environ | {"ANSIBLE_LOCAL_TEMP": str(folder / "tmp"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORKS": "1"}
    env |= {"ANSIBLE_ROLES_PATH": str(ANSIBLE / "roles"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([tool(name), *arguments], cwd=ANSIBLE, env=env, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def play(folder: Path, task: dict[str, Any], *, ok: bool = True, address: str | None = BS, **variables: Any) -> str:
    """A task on this machine, with the defaults of two roles; never one that changes what is not in `folder`."""
    defaults = [str(ANSIBLE / "roles" / role / "defaults/main.yml") for role in ("wdmoe", "jetson_node")]
    plays = [{"hosts": "localhost", "gather_facts": False, "vars_files": defaults, "tasks": [task]}]
    (folder / "play.yml").write_text(json.dumps(plays))
    given = {"ansible_python_interpreter": sys.executable, **variables}
    extra = json.dumps(given if address is None else {"wdmoe_bs_address": address, **given})
    arguments = ["-i", "localhost,", "-c", "local", "-e", extra, str(folder / "play.yml")]
    return run("ansible-playbook", *arguments, folder=folder, ok=ok)


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_playbook_is_one_to_ansible(playbook: str, tmp_path: Path) -> None:
    run("ansible-playbook", "-i", "inventory/lab.yml", "--syntax-check", playbook, folder=tmp_path)


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_an_example_inventory_has_boards_and_the_base_stations_address(inventory: str, tmp_path: Path) -> None:
    listed = json.loads(run("ansible-inventory", "-i", f"inventory/{inventory}", "--list", folder=tmp_path))
    facts = listed["_meta"]["hostvars"]
    boards = [name for name, told in facts.items() if told.get("ansible_user") == "jetson"]
    assert len(boards) >= 2
    assert all(facts[name]["wdmoe_bs_address"] for name in boards)
    assert all(facts[name]["ansible_host"] for name in boards)


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_testbed_reads_the_same_boards_from_an_example_inventory_as_ansible(inventory: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from testbed.fleet.inventory import read_inventory

    file = ANSIBLE / "inventory" / inventory
    listed = json.loads(run("ansible-inventory", "-i", str(file), "--list", folder=tmp_path))["_meta"]["hostvars"]
    boards = read_inventory(file).boards
    assert {board.name: board.address for board in boards} == {
        name: told["ansible_host"] for name, told in listed.items() if told.get("ansible_user") == "jetson"
    }


def test_ansible_lint_finds_nothing_by_its_strictest_profile(tmp_path: Path) -> None:
    run("ansible-lint", "--offline", "-q", "--profile", "production", folder=tmp_path)


def test_jetpack_5_and_older_are_refused_in_one_line(tmp_path: Path) -> None:
    board = {"python": "3.8", "machine": "aarch64", "l4t": "35.4.1"}
    role = {"ansible.builtin.include_role": {"name": "wdmoe"}}
    said = play(tmp_path, role, ok=False, wdmoe_board=board)
    assert "localhost: not supported: Python 3.8 (L4T 35.4.1)" in said


def test_a_board_with_python_3_10_is_not_refused(tmp_path: Path) -> None:
    board = {"python": "3.10", "machine": "aarch64", "l4t": "36.4.3"}
    play(tmp_path, {"ansible.builtin.include_role": {"name": "wdmoe"}}, wdmoe_board=board)


def test_without_an_address_of_the_base_station_nothing_begins(tmp_path: Path) -> None:
    said = play(tmp_path, {"ansible.builtin.include_role": {"name": "wdmoe"}}, ok=False, address=None)
    assert "missing required arguments: wdmoe_bs_address" in said


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node's unit as a board gets it, with a Python that is here."""
    folder = tmp_path_factory.mktemp("unit")
    path = folder / "wdmoe-node.service"
    source = ANSIBLE / "roles/jetson_node/templates/node.service.j2"
    template = {"src": str(source), "dest": str(path), "mode": "0644"}
    groups = ["video", "render"]
    play(folder, {"ansible.builtin.template": template}, jetson_node_groups=groups, wdmoe_python=sys.executable)
    return path


def test_the_unit_is_one_to_systemd_and_exposes_little(unit: Path, tmp_path: Path) -> None:
    argv = [tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stderr
    assert unit.name not in said
    limit = f"--threshold={EXPOSURE_TENTHS}"
    run("systemd-analyze", "security", "--offline=true", limit, "--no-pager", str(unit), folder=tmp_path)


def test_the_unit_keeps_open_what_cuda_needs_and_is_watched(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    keys = {line.split("=")[0] for line in lines if "=" in line and not line.startswith("#")}
    closing = {"PrivateDevices", "DevicePolicy", "ProtectClock", "ProcSubset", "MemoryDenyWriteExecute", "PrivateUsers"}
    assert not keys & closing
    assert "SupplementaryGroups=video render" in lines
    assert {"Type=notify", "WatchdogSec=10", "Restart=always", "StartLimitIntervalSec=0"} <= set(lines)
