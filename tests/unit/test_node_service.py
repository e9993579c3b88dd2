from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jetson_node.service import told_to_systemd

WATCHDOG_USEC = 10_000_000


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def heard(systemd: socket.socket) -> list[str]:
    said = []
    with suppress(BlockingIOError):
        while True:
            said.append(systemd.recv(4096).decode())
    return said


def environment(systemd: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(WATCHDOG_USEC), **more}


def test_a_node_is_ready_when_its_loop_asks_for_the_first_time(systemd: socket.socket) -> None:
    stop = told_to_systemd(lambda: False, environment(systemd), now_ns=lambda: 0)
    assert heard(systemd) == []
    stop()
    assert heard(systemd)[0].split("\n")[0] == "READY=1"


def test_the_watchdog_hears_of_turns_four_times_in_its_period_and_never_between_them(systemd: socket.socket) -> None:
    clock_ns = [0]
    stop = told_to_systemd(lambda: False, environment(systemd), now_ns=lambda: clock_ns[0])
    for clock_ns[0] in range(0, WATCHDOG_USEC * 1000, 50_000_000):
        stop()
    pings = [said for said in heard(systemd) if said == "WATCHDOG=1"]
    assert len(pings) == 4
    clock_ns[0] += 60_000_000_000  # the loop hangs: nobody asks, so nobody tells
    assert heard(systemd) == []


def test_a_stopping_node_says_so(systemd: socket.socket) -> None:
    stop = told_to_systemd(lambda: True, environment(systemd))
    assert stop()
    assert heard(systemd)[-1] == "STOPPING=1"


@pytest.mark.parametrize("more", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_that_waits_for_nobody_here_is_not_told(systemd: socket.socket, more: dict[str, str]) -> None:
    told_to_systemd(lambda: False, environment(systemd, **more))()
    assert [said for said in heard(systemd) if "WATCHDOG" in said] == []


def test_the_watchdog_of_this_process_is_told(systemd: socket.socket) -> None:
    told_to_systemd(lambda: False, environment(systemd, WATCHDOG_PID=str(os.getpid())))()
    assert "WATCHDOG=1" in heard(systemd)


def test_an_abstract_address_is_told(tmp_path: Path) -> None:
    name = f"wdmoe-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.setblocking(False)
        told_to_systemd(lambda: False, {"NOTIFY_SOCKET": f"@{name}"})()
        assert heard(listening)[0].startswith("READY=1")


@pytest.mark.parametrize("told", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_a_node_on_a_terminal_tells_nobody(told: dict[str, str]) -> None:
    def stop() -> bool:
        return False

    assert told_to_systemd(stop, told) is stop


def test_a_systemd_that_is_gone_stops_no_node(tmp_path: Path) -> None:
    stop = told_to_systemd(lambda: False, {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "1000"})
    assert stop() is False
    assert stop() is False
