"""A virtual rack boots, runs a testbed over real ssh, systemd and sockets, leaves nothing behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("yaml")

from processes import until
from virtual_rack import Testbed, left_of, on_board, put_nodes, rack_up, why_not

from testbed.fleet.inventory import Inventory, read_inventory
from testbed.runlog.reader import read_events

REASON = why_not()
pytestmark = [
    pytest.mark.root,
    pytest.mark.provisioning,
    pytest.mark.torch,
    pytest.mark.timeout(300),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
NAME = "tested"
DEVICES = ["jetson-0", "jetson-1"]


class Rack(NamedTuple):
    testbed: Testbed
    file: Path
    inventory: Inventory
    folder: Path
    run_file: Path


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    folder = tmp_path_factory.mktemp("rack")
    testbed, file = Testbed(folder / "state", NAME), folder / "rack.yml"
    with rack_up(testbed, file, "--nodes", str(len(DEVICES)), "--rate-mbit", "50") as said:
        assert said["devices"] == DEVICES
        run_file = put_nodes(testbed, file, folder)
        yield Rack(testbed, file, read_inventory(file), folder, run_file)


def test_boards_look_like_a_jetson_to_programs(rack: Rack) -> None:
    board = rack.inventory.boards[1]
    assert "R36 (release), REVISION: 4.4" in on_board(board, "cat /etc/nv_tegra_release")
    assert on_board(board, "/usr/sbin/nvpmodel -q").splitlines() == ["NV Power Mode: 25W", "1"]
    preflight = json.loads(
        on_board(board, f"cd /; sudo -n {board.python} -m firmware_setup.preflight --json --no-cuda; true")
    )
    assert (preflight["jetson"], preflight["software"]["jetpack"], preflight["clocks"]["locked"]) == (
        True,
        "6.2.1",
        False,
    )


def test_a_mode_and_locked_clocks_behave_as_on_a_board(rack: Rack) -> None:
    board = rack.inventory.boards[0]
    on_board(board, "sudo -n nvpmodel -m 2 && sudo -n jetson_clocks")
    locked = on_board(board, "sudo -n jetson_clocks --show")
    assert "MinFreq=1728000 MaxFreq=1728000" in locked
    refused = on_board(board, "echo no | sudo -n nvpmodel -m 3 || sudo -n nvpmodel -q")
    assert "Reboot required for changing to this power mode: 3" in refused
    assert refused.endswith("NV Power Mode: MAXN_SUPER\n2\n")
    rack.testbed.on_rack("reboot", "jetson-0")
    assert on_board(board, "/usr/sbin/nvpmodel -q").splitlines() == ["NV Power Mode: MAXN_SUPER", "2"]
    assert "MinFreq=729600 MaxFreq=1728000" in on_board(board, "sudo -n jetson_clocks --show")


def test_a_link_carries_no_more_than_its_rate(rack: Rack) -> None:
    board = rack.inventory.boards[1]
    began_s = time.monotonic()
    assert on_board(board, "head -c 2000000 /dev/zero | tr '\\0' x").count("x") == 2**20  # what is read of an answer
    assert time.monotonic() - began_s > 0.9 * 2e6 * 8 / 50e6


def test_a_run_over_the_rack_gives_a_row_per_policy_and_an_event_per_board(rack: Rack) -> None:
    done = rack.testbed.run("run", rack.run_file, "--inventory", rack.file, "--out", rack.folder / "logs", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert [(row["policy"], row["lost"], row["orphaned"]) for row in document["rows"]] == [
        ("topk", 0, 0),
        ("wlr", 0, 0),
    ]
    assert "virtual boards" in document["links"]
    run_dir = rack.folder / "logs" / document["run"]
    boards = [event for event in read_events(run_dir) if event["kind"] == "board"]
    assert [event["device"] for event in boards] == DEVICES
    for event in boards:
        assert event["virtual"] is True
        assert event["power_mode"] in ("25W", "MAXN_SUPER")
        assert event["preflight"]["software"]["l4t"] == "36.4.4"
        assert event["hottest_c"] == pytest.approx(50.531)
    status = rack.testbed.run("fleet", "status", "--inventory", rack.file)
    assert status.returncode == 0, status.stdout


def test_a_rack_that_was_killed_while_it_came_up_is_removed_whole(tmp_path: Path) -> None:
    testbed = Testbed(tmp_path / "state", f"k{os.getpid() % 10**6}")
    process = testbed.start("rack", "up", "--nodes", "3", "--name", testbed.rack)
    try:
        until(lambda: left_of(testbed.rack, testbed.state).get("processes"), 60, "a device that boots")
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        assert left_of(testbed.rack, testbed.state)
    finally:
        testbed.on_rack("down")
    assert left_of(testbed.rack, testbed.state) == {}
    assert testbed.on_rack("down")["was_there"] is False


def test_a_wrong_word_is_told_in_one_line_and_changes_nothing(rack: Rack, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.yml"
    foreign.write_text("all: {}\n")
    for arguments, said in {
        ("up", "--name", NAME): "is up already",
        ("up", "--name", "Rack"): "small letters",
        ("up", "--nodes", "0", "--name", "none"): "--nodes 0",
        ("up", "--inventory", str(foreign), "--name", "none"): "not a rack's",
        ("up", "--subnet", "127.0.0.0/24", "--name", "none"): "already",
        ("freeze", "jetson-9", "--name", NAME): "no device jetson-9",
        ("status", "--name", "none"): "is not up",
    }.items():
        done = rack.testbed.run("rack", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    assert foreign.read_text() == "all: {}\n"
    assert left_of("none", rack.testbed.state / "none") == {}
