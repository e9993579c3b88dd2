"""What boards answer becomes a line of status, a rate or an event; what they do not answer stays unknown."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import ConfigError
from testbed.fleet.board_shaping import shape_script, shaped
from testbed.fleet.boards import MARK, board_status, examined
from testbed.fleet.inventory import Board
from testbed.fleet.remote import Answer, ask, ask_all

PREFLIGHT: dict[str, Any] = {
    "preflight": 1,
    "power": {"mode": "25W"},
    "clocks": {"locked": False},
    "thermal": {"hottest_c": 50.5, "zones_c": {"cpu": 50.5}},
    "wifi": [{"interface": "wlan0", "signal_dbm": -52}],
    "warnings": [],
    "problems": [],
}
SAID = "LoadState=loaded\nActiveState=active\nSubState=running\nNRestarts=2\nBootId=abc\nUptimeS=   120\n"


def board(name: str = "orin-0", **changes: Any) -> Board:
    facts: dict[str, Any] = {
        "address": "10.0.0.2", "user": "nvidia", "port": None, "key": None, "ssh_arguments": (),
        "unit": "wdmoe-node.service", "python": "python3", "bs_address": "10.0.0.1", "virtual": False,
    }  # fmt: skip
    return Board(name=name, **{**facts, **changes})


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the ssh client: it runs the script here, for boards whose address is not `away`."""
    client = tmp_path / "ssh"
    client.write_text('#!/bin/sh\ncase "$*" in *away*) echo "no route to host" >&2; exit 255;; esac\nexec sh -s\n')
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return client


def test_a_board_that_answers_is_told_whole() -> None:
    row = board_status(Answer(board(), 0, f"{SAID}{MARK}\nsome warning\n{json.dumps(PREFLIGHT)}\n", ""))
    assert (row["state"], row["restarts"], row["uptime_s"], row["boot_id"]) == ("active", 2, 120.0, "abc")
    assert (row["preflight"], row["error"]) == (PREFLIGHT, None)


def test_a_board_without_preflight_says_why_and_guesses_nothing() -> None:
    row = board_status(Answer(board(), 0, f"LoadState=not-found\n{MARK}\nNo module named firmware_setup\n", ""))
    assert (row["state"], row["restarts"], row["preflight"]) == ("not installed", None, None)
    assert "No module named firmware_setup" in row["error"]


def test_a_board_that_is_away_is_not_reached() -> None:
    row = board_status(Answer(board(), 255, "", "Connection refused"))
    assert (row["reached"], row["state"], row["error"]) == (False, None, "Connection refused")


@given(st.text(max_size=300), st.sampled_from([0, 1, 255, None]))
def test_whatever_a_board_says_becomes_a_line(said: str, code: int | None) -> None:
    row = board_status(Answer(board(), code, said.replace("x", MARK), ""))
    assert json.loads(json.dumps(row))["device"] == "orin-0"


def test_all_boards_are_asked_and_answered_for_in_their_order(ssh: Path) -> None:
    boards = [board("a"), board("b", address="away"), board("c")]
    heard: list[str] = []
    answers = ask_all(boards, "echo there", heard=lambda answer: heard.append(answer.board.name))
    assert [(answer.board.name, answer.code, answer.out) for answer in answers] == [
        ("a", 0, "there\n"),
        ("b", 255, ""),
        ("c", 0, "there\n"),
    ]
    assert answers[1].error == "no route to host"
    assert sorted(heard) == ["a", "b", "c"]


def test_a_board_that_never_answers_is_given_up_with_all_it_started(ssh: Path, tmp_path: Path) -> None:
    answer = ask(board(), f"echo $$ > {tmp_path}/pid; sleep 600", timeout_s=1.0)
    assert (answer.code, answer.error) == (None, "no answer within 1 s")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_a_board_floods_is_cut_off(ssh: Path) -> None:
    assert len(ask(board(), "head -c 3000000 /dev/zero | tr '\\0' x").out) == 2**20


def test_a_runs_log_learns_of_each_board_what_it_said(ssh: Path, tmp_path: Path) -> None:
    sudo = tmp_path / "sudo"
    sudo.write_text(f"#!/bin/sh\necho '{json.dumps(PREFLIGHT)}'\n")
    sudo.chmod(0o755)
    found = dict(examined([board("a"), board("b", address="away", virtual=True)]))
    assert (found["a"]["power_mode"], found["a"]["clocks_locked"], found["a"]["hottest_c"]) == ("25W", False, 50.5)
    assert (found["a"]["wifi"], found["a"]["error"]) == (PREFLIGHT["wifi"], None)
    assert (found["b"]["virtual"], found["b"]["power_mode"], found["b"]["error"]) == (True, None, "no route to host")


def test_a_rate_is_read_back_from_what_the_kernel_says() -> None:
    said = "wlan0: qdisc tbf d0f: root refcnt 3 rate 20Mbit burst 2012b lat 200ms\n"
    row = shaped(Answer(board(), 0, said, ""))
    assert (row["interface"], row["mbit_per_s"], row["done"]) == ("wlan0", 20.0, True)
    lifted = shaped(Answer(board(), 0, "wlan0: qdisc noqueue 0: root refcnt 2\n", ""))
    assert (lifted["mbit_per_s"], lifted["done"]) == (None, True)
    refused = shaped(Answer(board(), 1, "", "wlan0 has a root qdisc of another program (qdisc fq 8001: root)"))
    assert (refused["done"], refused["interface"]) == (False, None)


def test_shaping_needs_to_know_the_way_to_the_base_station() -> None:
    with pytest.raises(ConfigError, match="wdmoe_bs_address is missing"):
        shape_script(board(bs_address=None), 20.0)
    with pytest.raises(ConfigError, match="wdmoe_bs_address is missing"):
        shape_script(board(bs_address="$(reboot)"), 20.0)
