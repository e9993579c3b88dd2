"""What is wrong with rate shaping is told in one line, before anything is changed."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import write_split

from bs_node.registry import Registry
from bs_node.station import Station
from jetson_node.__main__ import main as node_main
from jetson_node.link import Link
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import manifest_hash
from testbed.errors import ConfigError
from testbed.shaping import DownlinkShaper, UplinkShaper, interface
from testbed.shaping.tc import Tc
from testbed.wire.messages import PROTOCOL_VERSION, Heartbeat, Hello
from testbed.wire.sockets import NodeSocket, StationSocket

AT = {"near": "198.18.0.2", "far": "198.18.0.3"}


def told(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "far: no address is given: give the one it is reached at"),
        (None, "far: no address is given"),
        ("fe80::1", "far: 'fe80::1' is not an IPv4 address"),
        ("jetson-1", "far: 'jetson-1' is not an IPv4 address"),
        ("198.18.0.3/24", "far: '198.18.0.3/24' is not an IPv4 address"),
        ("198.18.0.3 flowid 1:1", "is not an IPv4 address"),
        ("198.18.0.2", "near and far are both at 198.18.0.2: give each its own"),
    ],
)
def test_an_address_that_cannot_be_matched_is_told_with_its_device(address: Any, words: str) -> None:
    assert words in told(lambda: DownlinkShaper("lo", {**AT, "far": address}, 20e6))


def test_no_device_at_all_is_told() -> None:
    assert "no device has an address" in told(lambda: DownlinkShaper("lo", {}, 20e6))


@pytest.mark.parametrize("total", [0, -1.0, 1999.0, np.nan, np.inf, 3e11])
def test_a_total_that_no_class_can_have_a_part_of_is_told(total: float) -> None:
    assert "the rate of near is" in told(lambda: DownlinkShaper("lo", AT, total))


def test_an_uplink_needs_the_address_of_its_base_station() -> None:
    assert "the base station: 'station' is not an IPv4 address" in told(lambda: UplinkShaper("lo", "station"))


def test_who_may_not_change_interfaces_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_effective_capabilities", lambda: 0)
    assert told(lambda: UplinkShaper("lo", "127.0.0.1")).startswith("rate shaping needs root or CAP_NET_ADMIN")


def test_a_node_that_may_not_shape_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interface, "_effective_capabilities", lambda: 0)
    monkeypatch.setattr("jetson_node.__main__._stop_condition", lambda _: lambda: True)
    arguments = "--name near --station tcp://127.0.0.1:5555 --shards nowhere --shape-interface lo"
    assert node_main(arguments.split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: rate shaping needs root or CAP_NET_ADMIN: start as root, or without rate shaping"
    ]


@pytest.fixture
def may_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_effective_capabilities", lambda: interface.CAP_NET_ADMIN)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rate shaping needs Linux")
@pytest.mark.usefixtures("may_shape")
def test_an_interface_that_is_not_there_is_told_with_those_that_are() -> None:
    there = ", ".join(name for _, name in socket.if_nameindex())
    assert f"no interface 'wlan7'; there are {there}" in told(lambda: UplinkShaper("wlan7", "127.0.0.1"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rate shaping needs Linux")
@pytest.mark.usefixtures("may_shape")
def test_missing_tools_are_told_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    words = "rate shaping needs ip and tc: install the package iproute2"
    assert told(lambda: UplinkShaper("lo", "127.0.0.1")) == words


def test_another_system_than_linux_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "rate shaping needs Linux" in told(lambda: UplinkShaper("lo", "127.0.0.1"))


@pytest.mark.usefixtures("may_shape")
@pytest.mark.parametrize(
    ("qdisc", "accepted"),
    [
        ("qdisc noqueue 0: root refcnt 2", True),
        ("qdisc fq_codel 0: root refcnt 2 limit 10240p flows 1024 quantum 1514", True),
        ("qdisc mq 0: root \nqdisc pfifo_fast 0: parent :1 bands 3 priomap 1 2 2 2", True),
        ("qdisc pfifo_fast 0: root refcnt 2 bands 3", True),
        ("qdisc noqueue 0: root refcnt 2\nqdisc clsact ffff: parent ffff:fff1", True),
        ("", True),
        ("qdisc htb 1: root refcnt 2 r2q 10 default 0x10 direct_packets_stat 0 direct_qlen 1000", False),
        ("qdisc fq_codel 8003: root refcnt 2 limit 100p", False),  # given by hand: its settings would be lost
        ("qdisc cake 8005: root refcnt 9 bandwidth 50Mbit", False),
    ],
)
def test_only_what_the_kernel_gives_by_itself_is_replaced(
    monkeypatch: pytest.MonkeyPatch, qdisc: str, accepted: bool
) -> None:
    ran: list[str] = []

    def answer(*command: str) -> str:
        ran.append(" ".join(command))
        return qdisc if command[0] == "tc" else '[{"gso_max_segs": 64}]'

    monkeypatch.setattr(interface, "_run", answer)
    if accepted:
        claimed = interface.Interface("lo")
        assert "r2q 64 " in claimed.qdisc_line()
        claimed.restore()
    else:
        kind, handle = qdisc.split()[1:3]
        words = told(lambda: interface.Interface("lo"))
        assert f"lo has a root qdisc of its own ({kind} {handle})" in words
        assert words.endswith("or remove it with `tc qdisc delete dev lo root`")
        told(lambda: interface.Interface("lo"))  # and is not claimed
    assert not [command for command in ran if "show" not in command]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Tc]:
    """A `tc` that does what a script says."""

    def make(script: str) -> Tc:
        (tmp_path / "tc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "tc").chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return Tc()

    return make


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", "tc ended with exit code 3: it gave no reason: mend that and start again"),
        ("read l; echo Error: no; echo Command failed -:1 >&2; exit 1", "tc ended with exit code 1: Error: no Command"),
        ("read l; echo class 1; exit 0", "tc ended with exit code 0: class 1:"),
        ("exec sleep 60", "tc has not answered for 0.05 s"),
    ],
)
def test_a_tool_that_ends_fails_or_hangs_is_told_in_its_own_words(
    tools: Callable[[str], Tc], monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    monkeypatch.setattr("testbed.shaping.tc.ANSWERS_WITHIN_S", 0.05 if "sleep" in script else 20.0)
    tc = tools(script)
    try:
        assert words in told(lambda: tc.run(["a", "b"], until="qdisc"))
    finally:
        tc.close()


def test_answers_may_come_in_pieces_and_among_warnings(tools: Callable[[str], Tc]) -> None:
    tc = tools("read l; read m; echo Warning: x; printf 'class 1\\nqdi'; sleep 0.01; echo sc 2; cat")
    try:
        assert tc.run(["a", "b"], until="qdisc") == "Warning: x\nclass 1\nqdisc 2\n"
        assert tc.run(["qdisc 3"], until="qdisc") == "qdisc 3\n"
    finally:
        tc.close()


class Shaper:
    """Notes what a link asks of it; None: no limit."""

    def __init__(self) -> None:
        self.asked: list[float | None] = []
        self.set_rate: Callable[[float], None] = self.asked.append

    def lift(self) -> None:
        self.asked.append(None)


SPEC = FfnSpec(width=8, inner=8, has_gate=True, act="silu")
EVERY = {"run": 1, "enrolled": None, "heartbeat_ns": 10**9, "window_bytes": 2**20}


class Pair:
    """A station and the link of its only node, over loopback, in this thread."""

    def __init__(self, stack: ExitStack, folder: Path, shaper: Any) -> None:
        manifest = write_split(folder, SPEC, devices=["near"], layers=1)[0]
        hello = Hello(PROTOCOL_VERSION, "near", 1, manifest_hash(manifest), manifest.held_counts("near"), {})
        sockets = StationSocket("127.0.0.1", 0, None, None)
        stack.callback(sockets.close)
        registry = Registry(manifest, silence_ns=10**11)
        self.station = Station(sockets, registry, on_event=lambda *_, **__: None, **EVERY)
        self.node = registry.nodes[0]
        endpoint = f"tcp://127.0.0.1:{sockets.port}"
        self.link = Link(lambda: NodeSocket(endpoint, None, None), hello, 20.0, shaper=shaper)
        stack.callback(self.link.close)

    def turn_until(self, found: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 20
        while not found():
            assert time.monotonic() < deadline_s
            self.link.keep()
            self.station.receive(1)
            self.link.receive()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_node_does_what_it_is_asked_and_each_welcome_begins_without_a_limit(stack: ExitStack, tmp_path: Path) -> None:
    shaper = Shaper()
    pair = Pair(stack, tmp_path, shaper)
    assert not pair.station.shape(pair.node, 4e6)  # it is away; its welcome will tell it
    pair.turn_until(lambda: 4e6 in shaper.asked)
    assert shaper.asked == [None, 4e6] * (len(shaper.asked) // 2)
    assert pair.station.shape(pair.node, 5e6)
    pair.turn_until(lambda: shaper.asked[-1] == 5e6)
    shaper.asked.clear()
    pair.station.registry.forget(pair.node)  # as if its connection had been lost: it says hello again
    pair.link.send(Heartbeat(time.monotonic_ns(), {}))
    pair.turn_until(lambda: 5e6 in shaper.asked)
    assert shaper.asked == [None, 5e6] * (len(shaper.asked) // 2)


def test_a_node_that_was_not_told_its_interface_says_so_once(
    stack: ExitStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair(stack, tmp_path, None)
    pair.turn_until(lambda: pair.node.available)
    for rate in (5e6, 6e6):
        assert pair.station.shape(pair.node, rate)
    pair.station.say_goodbye(drain_s=0)
    pair.turn_until(lambda: pair.link.over)
    words = "the base station asks for an uplink of 5e+06 bit/s: ignored, as this node was started without"
    assert capsys.readouterr().err == f"near: {words} --shape-interface\n"


@pytest.mark.parametrize("rate", [0, -1.0, 999.0, np.nan, np.inf])
def test_a_rate_that_no_node_would_read_is_told_and_not_sent(stack: ExitStack, tmp_path: Path, rate: float) -> None:
    pair = Pair(stack, tmp_path, Shaper())
    assert "rate shaping: near: an uplink rate of" in told(lambda: pair.station.shape(pair.node, rate))
