from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import zmq

from testbed.errors import ConfigError, NodeError
from testbed.wire.keys import KeyPair, make_pair
from testbed.wire.sockets import FAILED_HANDSHAKES, MAX_MESSAGE_BYTES, AllowList, NodeSocket, StationSocket

HOST = "127.0.0.1"
DEADLINE_S = 20.0
CLOSED_WITHIN_S = 2.0
STATION, NEAR, FAR, STRANGER = make_pair(), make_pair(), make_pair(), make_pair()


class Bench:
    """A station that reads all it gets, and nodes around it. Everything is closed at the end."""

    def __init__(self, stack: ExitStack, keys: KeyPair | None = STATION) -> None:
        self.stack = stack
        self.device_of_key = {NEAR.public: "near", FAR.public: "far"}
        self.station = StationSocket(HOST, 0, keys, AllowList(self.device_of_key) if keys is not None else None)
        stack.callback(self.station.close)
        self.received: list[list[zmq.Frame]] = []

    @property
    def contents(self) -> list[bytes]:
        return [frames[1].bytes for frames in self.received]

    def node(self, keys: KeyPair | None, station_public: str | None) -> NodeSocket:
        node = NodeSocket(f"tcp://{HOST}:{self.station.port}", keys, station_public)
        self.stack.callback(node.close, linger_ms=0)
        return node

    def raw_connection(self) -> socket.socket:
        return self.stack.enter_context(closing(socket.create_connection((HOST, self.station.port))))

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline_s:
                pytest.fail(f"waited {DEADLINE_S} s for {what}")
            timeout_ms = 2
            while (frames := self.station.receive(timeout_ms)) is not None:
                self.received.append(frames)
                timeout_ms = 0

    def gets_through(self, node: NodeSocket, content: bytes) -> list[zmq.Frame]:
        self.until(lambda: try_send(node, content), "a connection")
        self.until(lambda: content in self.contents, "the message")
        return self.received[self.contents.index(content)]

    def gets_nowhere(self, node: NodeSocket, refusals: int = 1) -> int:
        """Try to send until the handshake has failed so often. Returns the event of the last failure."""
        failures: list[int] = []

        def refused() -> bool:
            assert not try_send(node, b"let me in")
            failures.extend(event.event for event in node.events() if event.event & FAILED_HANDSHAKES)
            return len(failures) >= refusals

        self.until(refused, "a failed handshake")
        assert self.received == []
        assert not node.socket.poll(0)
        return failures[-1]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


def accepted(send: Callable[[], Any]) -> bool:
    try:
        send()
    except zmq.Again:
        return False
    return True


def try_send(node: NodeSocket, content: bytes) -> bool:
    return accepted(lambda: node.socket.send(content, zmq.DONTWAIT))


def test_an_enrolled_node_gets_through_and_its_messages_carry_its_key(bench: Bench) -> None:
    for keys, content in ((NEAR, b"I am near"), (FAR, b"I am far")):
        routing_id, _ = bench.gets_through(bench.node(keys, STATION.public), content)
        assert routing_id.get("User-Id") == keys.public
    assert bench.station.take_refused_keys() == []


def test_what_the_station_sends_reaches_the_node(bench: Bench) -> None:
    node = bench.node(NEAR, STATION.public)
    routing_id, _ = bench.gets_through(node, b"hello")
    bench.station.socket.send_multipart([routing_id.bytes, b"header", b"payload"])
    assert node.socket.poll(int(DEADLINE_S * 1000))
    assert node.socket.recv_multipart() == [b"header", b"payload"]


def test_an_unknown_key_is_refused_and_named_once(bench: Bench) -> None:
    stranger = bench.node(STRANGER, STATION.public)
    assert bench.gets_nowhere(stranger) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert bench.station.take_refused_keys() == [STRANGER.public]
    assert bench.station.take_refused_keys() == []
    bench.gets_through(bench.node(NEAR, STATION.public), b"hello")
    assert bench.contents == [b"hello"]


def test_a_key_enrolled_later_gets_in_with_a_new_socket_and_without_a_restart(bench: Bench) -> None:
    bench.gets_nowhere(bench.node(STRANGER, STATION.public))
    bench.device_of_key[STRANGER.public] = "stranger"
    bench.gets_through(bench.node(STRANGER, STATION.public), b"hello")


def test_a_node_without_keys_gets_nothing_from_a_station_with_keys(bench: Bench) -> None:
    bench.gets_nowhere(bench.node(None, None))
    bench.gets_through(bench.node(NEAR, STATION.public), b"hello")
    assert bench.contents == [b"hello"]


def test_a_node_that_expects_another_station_gets_nothing(bench: Bench) -> None:
    assert bench.gets_nowhere(bench.node(NEAR, STRANGER.public)) == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    bench.gets_through(bench.node(FAR, STATION.public), b"hello")
    assert bench.contents == [b"hello"]


def test_nobody_gets_in_once_the_key_check_has_stopped(bench: Bench) -> None:
    bench.gets_through(bench.node(NEAR, STATION.public), b"before")
    assert bench.station._authenticator is not None
    bench.station._authenticator.stop()
    bench.received.clear()
    for keys in (FAR, STRANGER):
        bench.gets_nowhere(bench.node(keys, STATION.public), refusals=2)


def test_a_node_with_keys_sends_nothing_to_a_station_without() -> None:
    with ExitStack() as stack:
        open_bench = Bench(stack, keys=None)
        open_bench.gets_nowhere(open_bench.node(NEAR, STATION.public))


def test_without_keys_on_both_sides_messages_travel_as_asked() -> None:
    with ExitStack() as stack:
        open_bench = Bench(stack, keys=None)
        open_bench.gets_through(open_bench.node(None, None), b"hello")
        assert open_bench.station.take_refused_keys() == []


def test_half_of_what_protection_needs_is_refused_not_ignored() -> None:
    for keys, allow in ((STATION, None), (None, AllowList({}))):
        with pytest.raises(ConfigError, match="keys and an allow-list belong together"):
            StationSocket(HOST, 0, keys, allow)
    for pair, station_public in ((NEAR, None), (None, STATION.public)):
        with pytest.raises(ConfigError, match="needs its keys and the base station's public key"):
            NodeSocket(f"tcp://{HOST}:9", pair, station_public)


@pytest.mark.parametrize("endpoint", ["", "nonsense", "tcp://", "tcp://127.0.0.1", "http://127.0.0.1:80"])
def test_an_endpoint_that_is_none_is_refused_in_one_line(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^cannot connect to .*give the base station as tcp://ADDRESS:PORT$"):
        NodeSocket(endpoint, NEAR, STATION.public)


def test_strangers_noise_at_the_port_does_not_disturb_the_enrolled(bench: Bench) -> None:
    noise = (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x05\x95", bytes(100), b"\xff" * 100, b"\xff\x00\x00\x00", b"")
    for content in noise * 5:
        bench.raw_connection().sendall(content)
    bench.gets_through(bench.node(NEAR, STATION.public), b"hello")
    assert bench.contents == [b"hello"]


def test_a_message_above_the_limit_costs_its_sender_the_connection_and_nobody_else(bench: Bench) -> None:
    near, far = bench.node(NEAR, STATION.public), bench.node(FAR, STATION.public)
    bench.gets_through(near, b"near")
    bench.gets_through(far, b"far")
    near.events()
    assert try_send(near, bytes(MAX_MESSAGE_BYTES + 1))
    bench.until(lambda: any(e.event == zmq.EVENT_DISCONNECTED for e in near.events()), "the disconnection")
    bench.gets_through(far, b"far again")
    assert bench.contents == [b"near", b"far", b"far again"]


def test_the_station_hears_which_descriptor_a_lost_connection_had(bench: Bench) -> None:
    node = bench.node(NEAR, STATION.public)
    routing_id, _ = bench.gets_through(node, b"hello")
    bench.station.events()
    node.close(linger_ms=0)
    lost: list[int] = []

    def disconnected() -> bool:
        lost.extend(e.value for e in bench.station.events() if e.event == zmq.EVENT_DISCONNECTED)
        return bool(lost)

    bench.until(disconnected, "the disconnection")
    assert lost == [routing_id.get(zmq.SRCFD)]


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir gives paths, we need names


def listening() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which this process listens, from the kernel's own table."""
    links = [Path("/proc/self/fd", name) for name in open_descriptors()]
    ours = {os.readlink(link) for link in links if link.is_symlink()}  # noqa: PTH115 - a socket is no path
    found = set()
    for table in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")):
        for row in table.read_text().splitlines()[1:] if table.exists() else []:
            columns = row.split()
            address, port = columns[1].split(":")
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in ours:
                found.add((address, int(port, 16)))
    return found


@pytest.mark.parametrize(("host", "in_table"), [("127.0.0.1", "0100007F"), ("127.0.0.2", "0200007F")])
@pytest.mark.parametrize("keys", [STATION, None], ids=["keys", "insecure"])
def test_the_station_listens_on_the_address_asked_for_and_no_other(
    host: str, in_table: str, keys: KeyPair | None
) -> None:
    before = listening()
    station = StationSocket(host, 0, keys, AllowList({}) if keys is not None else None)
    try:
        assert listening() - before == {(in_table, station.port)}
    finally:
        station.close()
    assert listening() == before


def test_a_node_listens_nowhere(bench: Bench) -> None:
    before = listening()
    bench.gets_through(bench.node(NEAR, STATION.public), b"hello")
    assert listening() == before


@pytest.mark.parametrize("keys", [STATION, None], ids=["keys", "insecure"])
def test_a_port_in_use_is_one_line_and_leaves_nothing_behind(bench: Bench, keys: KeyPair | None) -> None:
    threads, port = threading.active_count(), bench.station.port
    with pytest.raises(NodeError, match=f"^cannot listen on {HOST}:{port}: Address already in use: another program"):
        StationSocket(HOST, port, keys, AllowList({}) if keys is not None else None)
    assert threading.active_count() == threads
    bench.gets_through(bench.node(NEAR, STATION.public), b"still there")


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_one_line(host: str) -> None:
    with pytest.raises(NodeError, match=rf"^cannot listen on {host}:0: [\w ]+: check \[listen\] host$"):
        StationSocket(host, 0, STATION, AllowList({}))


def seconds_to(close: Callable[[], None]) -> float:
    started_s = time.monotonic()
    close()
    return time.monotonic() - started_s


def test_closing_takes_less_than_two_seconds_whatever_is_still_on_its_way() -> None:
    threads, descriptors = threading.active_count(), open_descriptors()
    with ExitStack() as stack:
        bench = Bench(stack)
        near, far = bench.node(NEAR, STATION.public), bench.node(FAR, STATION.public)
        strangers = [bench.node(STRANGER, STATION.public), bench.node(None, None), bench.node(NEAR, FAR.public)]
        half_open = [bench.raw_connection() for _ in range(10)]
        half_open[0].sendall(b"\xff")
        near_id = bench.gets_through(near, b"near")[0].bytes
        bench.gets_through(far, b"far")
        fill(lambda: accepted(lambda: bench.station.socket.send_multipart([near_id, bytes(2**16)], zmq.DONTWAIT)))
        fill(lambda: try_send(far, bytes(2**16)))
        assert seconds_to(bench.station.close) < CLOSED_WITHIN_S
        for node in (near, far, *strangers):
            assert seconds_to(node.close) < CLOSED_WITHIN_S
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


def fill(send: Callable[[], bool]) -> None:
    """Send until nothing moves any more: the queues of both sides and the kernel's buffers are full."""
    refusals = 0
    while refusals < 20:
        refusals = 0 if send() else refusals + 1
        time.sleep(0.002 if refusals else 0)


def test_closing_twice_is_closing_once(bench: Bench) -> None:
    node = bench.node(NEAR, STATION.public)
    for _ in range(2):
        node.close()
        bench.station.close()
