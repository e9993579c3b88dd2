"""Links in the kernel carry bytes at the rates asked, fail on demand, and leave nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest
import zmq
from processes import until

from testbed.channel.kernel import NAMESPACES, enter, missing
from testbed.channel.namespaces import NamespaceLinks
from testbed.errors import ConfigError
from testbed.wire.keys import KeyPair, make_pair
from testbed.wire.sockets import AllowList, NodeSocket, StationSocket

REASON = missing()
in_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEADLINE_S = 20.0
FIRST_BYTES = 2048  # pass at once at the rates used here, and some more that were on their way
STATION, NEAR = make_pair(), make_pair()


class Connection:
    """A TCP connection between the base station and a device, both ends in this process."""

    def __init__(self, stack: ExitStack, links: NamespaceLinks, device: str) -> None:
        door = stack.enter_context(closing(socket.create_server((links.station_host, 0))))
        door.settimeout(DEADLINE_S)
        self.node = stack.enter_context(closing(connect_from(links, device, door.getsockname()[1])))
        self.station = stack.enter_context(closing(door.accept()[0]))
        for end in (self.node, self.station):
            end.settimeout(DEADLINE_S)

    def carry_s(self, size_bytes: int, *, up: bool = False) -> float:
        """How long the bytes take from one end to the other."""
        source, sink = (self.node, self.station) if up else (self.station, self.node)
        began_s = time.monotonic()
        with ThreadPoolExecutor(1) as other_side:
            sent = other_side.submit(source.sendall, bytes(size_bytes))
            receive(sink, size_bytes)
            took_s = time.monotonic() - began_s
            sent.result(DEADLINE_S)
        return took_s


def connect_from(links: NamespaceLinks, device: str, port: int) -> socket.socket:
    """A socket stays in the namespace of the thread that made it; that thread ends with this call."""

    def connect() -> socket.socket:
        enter(links.namespaces[device])
        return socket.create_connection((links.station_host, port), timeout=DEADLINE_S)

    with ThreadPoolExecutor(1) as inside:
        return inside.submit(connect).result(DEADLINE_S)


def receive(end: socket.socket, size_bytes: int) -> None:
    while size_bytes:
        came = len(end.recv(min(size_bytes, 65536)))
        assert came, "the connection was closed"
        size_bytes -= came


def least_s(size_bytes: int, bits_per_s: float) -> float:
    """What no link may undercut. There is no such bound above: a busy machine may be late by anything."""
    return (size_bytes - FIRST_BYTES) * 8 / bits_per_s


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def links(stack: ExitStack) -> NamespaceLinks:
    return stack.enter_context(NamespaceLinks(["near", "far"]))


@in_kernel
def test_bytes_arrive_from_two_namespaces_each_from_an_address_of_its_own(
    stack: ExitStack, links: NamespaceLinks
) -> None:
    near, far = Connection(stack, links, "near"), Connection(stack, links, "far")
    for connection in (near, far):
        connection.carry_s(100_000)
        connection.carry_s(100_000, up=True)
        assert connection.node.getpeername()[0] == links.station_host
    assert near.station.getpeername()[0] != far.station.getpeername()[0]


@in_kernel
@pytest.mark.parametrize("up", [False, True])
def test_a_megabyte_at_20_megabits_per_second_takes_0_4_seconds(
    stack: ExitStack, links: NamespaceLinks, up: bool
) -> None:
    """It cannot take less; the rest is loose, as other programs may hold the processor for a while."""
    links.set_links(0, *((5e6, 20e6) if up else (20e6, 5e6)))
    took_s = Connection(stack, links, "near").carry_s(10**6, up=up)
    assert least_s(10**6, 20e6) < took_s < 1.5  # less than the 1.6 s at the other direction's rate


@in_kernel
def test_new_rates_hold_for_what_is_under_way(stack: ExitStack, links: NamespaceLinks) -> None:
    links.set_links(0, 1e6, 1e6)
    connection = Connection(stack, links, "near")
    with ThreadPoolExecutor(1) as other_side:
        took_s = other_side.submit(connection.carry_s, 10**6)
        links.set_links(1, 200e6, 1e6)
        assert took_s.result(DEADLINE_S) < 4  # 8 s at the first rate, 0.04 s at the second
    links.set_links(2, 2e6, 1e6)
    assert connection.carry_s(100_000) > least_s(100_000, 2e6)


@in_kernel
def test_a_busy_link_leaves_the_other_alone(stack: ExitStack, links: NamespaceLinks) -> None:
    links.set_links(0, np.array([1e6, 100e6]), 1e6)
    near, far = Connection(stack, links, "near"), Connection(stack, links, "far")
    with ThreadPoolExecutor(1) as other_side:
        slow_s = other_side.submit(near.carry_s, 250_000)
        far.carry_s(10**6)
        assert not slow_s.done()  # 2 s against 0.08 s
        assert slow_s.result(DEADLINE_S) > least_s(250_000, 1e6)


@in_kernel
def test_a_cut_link_drops_its_connections_and_lets_no_other_in_until_restored(
    stack: ExitStack, links: NamespaceLinks
) -> None:
    near, far = Connection(stack, links, "near"), Connection(stack, links, "far")
    links.set_links(0, 2e6, 2e6)
    links.cut("near")
    for end in (near.station, near.node):
        with pytest.raises(ConnectionError):
            end.recv(1)
    with pytest.raises(OSError, match="unreachable"):
        Connection(stack, links, "near")
    far.carry_s(1000)
    links.restore("near")
    assert Connection(stack, links, "near").carry_s(100_000, up=True) > least_s(100_000, 2e6)


@in_kernel
def test_a_reset_drops_connections_and_lets_others_in_at_once(stack: ExitStack, links: NamespaceLinks) -> None:
    near, far = Connection(stack, links, "near"), Connection(stack, links, "far")
    links.reset("near")
    for end in (near.station, near.node):
        with pytest.raises(ConnectionError):
            end.recv(1)
    far.carry_s(1000)
    Connection(stack, links, "near").carry_s(1000)


@in_kernel
@pytest.mark.parametrize("up", [False, True])
def test_a_stalled_link_moves_nothing_and_loses_nothing(stack: ExitStack, links: NamespaceLinks, up: bool) -> None:
    connection = Connection(stack, links, "near")
    source, sink = (connection.node, connection.station) if up else (connection.station, connection.node)
    links.stall("near")
    links.set_links(0, 50e6, 50e6)
    with ThreadPoolExecutor(1) as other_side:
        sent = other_side.submit(source.sendall, bytes(100_000))
        sink.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sink.recv(1)
        links.resume("near")
        sink.settimeout(DEADLINE_S)
        receive(sink, 100_000)
        sent.result(DEADLINE_S)


def traces(pid: int) -> list[str]:
    """What a process has made: namespaces, and links by their names."""
    listed = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout)
    namespaces = [path.name for path in NAMESPACES.iterdir() if path.name.startswith(f"wdmoe-{pid}-")]
    return namespaces + [link["ifname"] for link in listed if link["ifname"].startswith(f"wd{pid:x}-")]


def routes(prefix: str) -> str:
    every = subprocess.run(["ip", "route", "show", "table", "all"], capture_output=True, check=True, text=True).stdout
    return "\n".join(line for line in every.splitlines() if prefix in line)


@in_kernel
def test_nothing_is_left_after_close() -> None:
    with NamespaceLinks(["near", "far"]) as links:
        subnet = links.station_host.rsplit(".", 1)[0] + "."
        assert len(traces(os.getpid())) == 4
        assert routes(subnet)
    assert traces(os.getpid()) == []
    assert routes(subnet) == ""
    links.close()  # again is no mistake


@in_kernel
def test_nothing_is_left_when_making_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NamespaceLinks, "_bucket", lambda *_: "qdisc replace dev lo root nonsense")
    with pytest.raises(ConfigError, match=r'^tc qdisc replace dev lo root nonsense: .*links = "relay"'):
        NamespaceLinks(["near"])
    assert traces(os.getpid()) == []


@in_kernel
def test_two_runs_at_once_have_links_of_their_own(stack: ExitStack, links: NamespaceLinks) -> None:
    with NamespaceLinks(["near"]) as others:
        assert others.station_host != links.station_host
        Connection(stack, others, "near").carry_s(1000)
    Connection(stack, links, "near").carry_s(1000)


OWNER = """
import sys
from testbed.channel.namespaces import NamespaceLinks
links = NamespaceLinks(["near"])
print(links.namespaces["near"], flush=True)
sys.stdin.read()
"""


@in_kernel
def test_what_a_killed_run_left_is_removed_by_the_next_even_from_under_a_living_node() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OWNER], text=True, **pipes) as owner:
        assert owner.stdout is not None
        namespace = owner.stdout.readline().strip()
        node = subprocess.Popen(["ip", "netns", "exec", namespace, "cat"], stdin=subprocess.PIPE)
        try:
            with NamespaceLinks(["near"]):
                assert len(traces(owner.pid)) == 2  # its owner lives
            owner.kill()
            owner.wait(DEADLINE_S)
            assert len(traces(owner.pid)) == 2
            with NamespaceLinks(["near"]):
                assert traces(owner.pid) == []
        finally:
            node.communicate(timeout=DEADLINE_S)


def echo_from(namespace: str, endpoint: str, keys: KeyPair, station_public: str) -> None:
    """A node that says who it is, answers every message with the same, and says so again after a break."""
    enter(namespace)
    node = NodeSocket(endpoint, keys, station_public)
    began_s, greeted = time.monotonic(), False
    while time.monotonic() < began_s + 2 * DEADLINE_S:
        if any(event.event == zmq.EVENT_DISCONNECTED for event in node.events()):
            greeted = False
        if not greeted:
            greeted = sends(node, b"hello")
        frames = node.receive(20)
        if frames is not None:
            sends(node, frames[0].bytes)


def sends(node: NodeSocket, content: bytes) -> bool:
    try:
        node.socket.send(content, zmq.DONTWAIT)
    except zmq.Again:
        return False
    return True


@in_kernel
def test_a_node_in_its_namespace_talks_to_the_station_under_curve_and_comes_back_after_a_cut(
    stack: ExitStack, links: NamespaceLinks
) -> None:
    station = StationSocket(links.station_host, 0, STATION, AllowList({NEAR.public: "near"}))
    stack.callback(station.close)
    links.set_links(0, 20e6, 20e6)
    arguments = (links.namespaces["near"], f"tcp://{links.station_host}:{station.port}", NEAR, STATION.public)
    process = multiprocessing.get_context("spawn").Process(target=echo_from, args=arguments, daemon=True)
    process.start()
    stack.callback(process.join)
    stack.callback(process.terminate)

    sender, hello = until(lambda: station.receive(10), DEADLINE_S, "a greeting")
    assert hello.bytes == b"hello"
    block, began_s = os.urandom(60_000), time.monotonic()
    station.socket.send_multipart([sender.bytes, block])
    frames = until(lambda: station.receive(10), DEADLINE_S, "the echo")
    assert frames[1].bytes == block
    assert time.monotonic() - began_s > 2 * least_s(60_000, 20e6)

    links.cut("near")
    until(lambda: any(e.event == zmq.EVENT_DISCONNECTED for e in station.events()), DEADLINE_S, "word of the cut")
    links.restore("near")
    assert until(lambda: station.receive(10), DEADLINE_S, "a greeting after the cut")[1].bytes == b"hello"


@in_kernel
@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((1e6, 1e6, 0.01), 'has no delay: set delay_s = 0, or links = "relay"'),
        ((0.0, 1e6), "prompt 7: down rate of near is 0.0 bit/s"),
        ((1e6, [1e6, np.nan]), "prompt 7: up rate of far is nan bit/s"),
        ((1e6, [1e6, 1e6, 1e6]), "not one value for each of 2 devices"),
    ],
)
def test_rates_that_cannot_be_are_told_in_one_line(links: NamespaceLinks, rates: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as told:
        links.set_links(7, *rates)
    assert "\n" not in str(told.value)


@in_kernel
def test_a_device_or_a_namespace_that_is_not_there_is_told_by_name(links: NamespaceLinks) -> None:
    with pytest.raises(ConfigError, match="no device 'nobody'; there are near, far"):
        links.cut("nobody")
    with pytest.raises(ConfigError, match="cannot enter the network namespace nowhere: No such file"):
        enter("nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"medium": "tdd"}, 'has no medium = \'tdd\', only "fdd": set links = "relay"'),
        ({"medium": "shared"}, "has no medium = 'shared'"),
        ({"mtu_bytes": 20}, "mtu_bytes = 20"),
        ({"devices": [f"jetson-{n}" for n in range(254)]}, "room for 253 devices: there are 254"),
    ],
)
def test_links_that_cannot_be_made_are_told_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NamespaceLinks(**{"devices": ["near"], **arguments})


@pytest.mark.parametrize("is_root", [True, False])
def test_who_lacks_the_right_or_the_tools_is_told_what_needs_neither(
    monkeypatch: pytest.MonkeyPatch, is_root: bool
) -> None:
    if is_root and REASON is not None:
        pytest.skip(REASON)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    words = "needs ip, tc, ss: install the package iproute2" if is_root else "needs root"
    with pytest.raises(ConfigError, match=f'^links = "namespaces" {words}.* or set links = "relay"'):
        NamespaceLinks(["near"])
