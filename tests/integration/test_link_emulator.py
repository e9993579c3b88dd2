"""The relay process with real sockets and real ZeroMQ: what it carries, when, and what its record says of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from select import select
from typing import Any

import pytest
import zmq
from processes import until

from testbed.channel.link_emulator import LinkEmulator
from testbed.channel.record import DOWN, UP, read_record
from testbed.errors import ConfigError, RunLogError, WdmoeError
from testbed.wire.keys import KeyPair, make_pair
from testbed.wire.sockets import AllowList, NodeSocket, StationSocket

HOST = "127.0.0.1"
DEADLINE_S = 20.0
DEVICES = ["near", "far"]
GREETING = b"\xff" + bytes(63)
Rows = list[dict[str, Any]]


def frame(size_bytes: int) -> bytes:
    """A ZMTP frame of so many bytes on the wire."""
    return b"\x02" + (size_bytes - 9).to_bytes(8, "big") + bytes(size_bytes - 9)


class Bench:
    """A base station's door, emulated links that lead to it, and plain connections through them."""

    def __init__(self, stack: ExitStack, folder: Path, medium: str = "fdd", **options: Any) -> None:
        self.stack, self.record = stack, folder / "links.parquet"
        self.door = stack.enter_context(closing(socket.create_server((HOST, 0))))
        self.door.settimeout(DEADLINE_S)
        station = self.door.getsockname()
        self.links = stack.enter_context(LinkEmulator(DEVICES, station, medium, self.record, **options))

    def connect(self, device: str = "near") -> tuple[socket.socket, socket.socket]:
        """The node's end and the base station's."""
        node = self.stack.enter_context(closing(socket.create_connection((HOST, self.links.ports[device]))))
        node.settimeout(DEADLINE_S)
        station = self.stack.enter_context(closing(self.door.accept()[0]))
        station.settimeout(DEADLINE_S)
        return node, station

    def rows(self, **values: int) -> Rows:
        """Close the links; what their record says of frames with these values, the greetings left out."""
        self.links.close()
        rows: Rows = read_record(self.record).to_pylist()
        return [row for row in rows if row["flags"] != 255 and values.items() <= row.items()]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def bench(stack: ExitStack, tmp_path: Path) -> Bench:
    return Bench(stack, tmp_path)


def send(end: socket.socket, content: bytes, chunk_bytes: Callable[[], int] = lambda: 10**9) -> threading.Thread:
    """In the background, in chunks of these sizes."""

    def work() -> None:
        at = 0
        while at < len(content):
            at += end.send(content[at : at + chunk_bytes()])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def receive(end: socket.socket, size_bytes: int) -> bytes:
    parts, left = [], size_bytes
    while left:
        parts.append(end.recv(min(left, 1 << 16)))
        assert parts[-1], "the connection ended"
        left -= len(parts[-1])
    return b"".join(parts)


def is_silent(end: socket.socket) -> bool:
    """Open, and nothing has come."""
    return not select([end], [], [], 0)[0]


def ended(end: socket.socket) -> bool:
    try:
        return end.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("kind", ["zmtp", "noise"])
def test_bytes_arrive_unchanged_and_in_order_in_both_directions(bench: Bench, kind: str) -> None:
    node, station = bench.connect()
    bench.links.set_links(1, 200e6, 100e6, 0.001)
    draw = random.Random(7)
    body = draw.randbytes(600_000)
    content = GREETING + b"\x02" + len(body).to_bytes(8, "big") + body if kind == "zmtp" else body
    threads = [send(end, content, lambda: draw.randint(1, 30_000)) for end in (node, station)]
    assert [receive(end, len(content)) == content for end in (station, node)] == [True, True]
    for thread in threads:
        thread.join()
    assert bench.links.stats()["unrecorded_streams"] == (0 if kind == "zmtp" else 2)
    assert [row["bytes"] for row in bench.rows()] == ([len(body) + 9] * 2 if kind == "zmtp" else [])


def test_a_megabyte_at_20_mbit_per_s_takes_its_time(bench: Bench) -> None:
    node, station = bench.connect()
    bench.links.set_links(1, 1e9, 20e6)
    content = GREETING + frame(500_000) + frame(10**6 - 500_064)
    started_s = time.monotonic()
    thread = send(node, content)
    receive(station, len(content))
    took_s = time.monotonic() - started_s
    thread.join()
    assert took_s >= 0.4
    bench.links.close()
    rows = read_record(bench.record).to_pylist()
    assert [(row["bytes"], row["direction"], row["prompt"]) for row in rows[1:]] == [(500_000, UP, 1), (499_936, UP, 1)]
    assert sum(row["air_ns"] for row in rows) == pytest.approx(0.4e9, abs=1)


def exchange_on_both_links(bench: Bench, frames: int, size_bytes: int) -> None:
    """Both devices send and are sent to at once."""
    pairs = [bench.connect(device) for device in DEVICES]
    bench.links.set_links(1, 8e6, 4e6)
    content = GREETING + frame(size_bytes) * frames
    ends = [end for pair in pairs for end in pair]
    threads = [send(end, content) for end in ends]
    for end in ends:
        receive(end, len(content))
    for thread in threads:
        thread.join()


def overlaps(rows: Rows) -> int:
    """How many frames began before the one before them had left the air."""
    spans = sorted((row["air_begin_ns"], row["air_end_ns"]) for row in rows)
    return sum(later[0] < earlier[1] - 1 for earlier, later in pairwise(spans))  # they are rounded


@pytest.mark.parametrize("medium", ["fdd", "tdd", "shared"])
def test_who_shares_the_air_waits_for_each_other_and_nobody_else(stack: ExitStack, tmp_path: Path, medium: str) -> None:
    bench = Bench(stack, tmp_path, medium)
    exchange_on_both_links(bench, frames=20, size_bytes=4000)
    rows = [row for row in bench.rows() if row["first_in_ns"] == row["last_in_ns"]]  # read in one go, one turn each
    assert len(rows) > 40
    of_direction = [
        [r for r in rows if (r["device"], r["direction"]) == way] for way in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert [overlaps(some) for some in of_direction] == [0, 0, 0, 0]
    assert (overlaps(of_direction[0] + of_direction[1]) == 0) == (medium != "fdd")
    assert (overlaps(rows) == 0) == (medium == "shared")


def test_links_with_air_of_their_own_do_not_slow_each_other(bench: Bench) -> None:
    exchange_on_both_links(bench, frames=3, size_bytes=30_000)
    rows = bench.rows()
    assert len(rows) == 12
    for row in rows:
        assert row["air_ns"] == pytest.approx(30_000 * 8e9 / (8e6 if row["direction"] == DOWN else 4e6))
        assert row["air_end_ns"] - row["air_begin_ns"] == pytest.approx(row["air_ns"], abs=1)


def test_on_shared_air_large_frames_take_turns(stack: ExitStack, tmp_path: Path) -> None:
    bench = Bench(stack, tmp_path, "shared", quantum_bytes=1000)
    exchange_on_both_links(bench, frames=1, size_bytes=30_000)
    rows = bench.rows()
    all_ns = sum(row["air_ns"] for row in rows)
    first, last = min(row["air_begin_ns"] for row in rows), max(row["air_end_ns"] for row in rows)
    assert last - first >= all_ns - 4
    for row in rows:
        assert row["air_end_ns"] - row["air_begin_ns"] > 2 * row["air_ns"], "three others had their turns in between"


def test_the_delay_is_added_once_per_direction(bench: Bench) -> None:
    ends = [bench.connect(device) for device in DEVICES]
    bench.links.set_links(1, 100e6, 50e6, [0.03, 0.05])
    for node, station in ends:
        for source, sink in ((node, station), (station, node)):
            started_s = time.monotonic()
            source.sendall(GREETING + frame(1000))
            receive(sink, 1064)
            assert time.monotonic() - started_s >= (0.03 if node is ends[0][0] else 0.05)
    for device, delay_ns in enumerate((30e6, 50e6)):
        rows = bench.rows(device=device)
        assert [row["due_ns"] - row["air_end_ns"] for row in rows] == [pytest.approx(delay_ns, abs=1)] * 2
        assert all(row["first_in_ns"] <= row["air_begin_ns"] and row["out_ns"] >= row["due_ns"] for row in rows)


def test_a_new_rate_is_in_force_for_the_next_frame_also_for_those_that_wait(bench: Bench) -> None:
    node, station = bench.connect()
    bench.links.set_links(1, 1e6, 1e6)
    content = GREETING + frame(8000) * 5  # 64 ms each
    node.sendall(content)
    until(lambda: bench.links.stats()["frames"], DEADLINE_S, "the greeting to have passed")
    bench.links.set_links(2, 1e6, 8e6)
    receive(station, len(content))
    node.sendall(frame(8000))
    receive(station, 8000)
    rows = bench.rows()
    took_ms = [round(row["air_ns"] / 1e6, 6) for row in rows]
    assert set(took_ms) == {64, 8}
    assert took_ms == sorted(took_ms, reverse=True)
    assert rows[-1]["prompt"] == 2


def test_a_receiver_that_does_not_read_stops_its_sender_and_loses_nothing(stack: ExitStack, tmp_path: Path) -> None:
    room_bytes = 100_000
    bench = Bench(stack, tmp_path, room_bytes=room_bytes)
    node, station = bench.connect()
    content = random.Random(3).randbytes(24 * 2**20)  # more than the buffers of the kernel take
    thread = send(node, content)
    until(lambda: bench.links.stats()["queued_bytes"] >= room_bytes, DEADLINE_S, "a full relay")
    assert bench.links.stats()["queued_bytes"] <= room_bytes + 65536
    assert thread.is_alive()
    assert receive(station, len(content)) == content
    thread.join()


def test_what_was_sent_before_the_end_arrives_before_the_end(bench: Bench) -> None:
    bench.links.set_links(1, 8e6, 8e6, 0.02)
    for closes, listens in ((0, 1), (1, 0)):
        ends = bench.connect()
        ends[closes].sendall(GREETING + frame(20_000))
        ends[closes].close()
        receive(ends[listens], 20_064)
        assert ended(ends[listens])
    until(lambda: bench.links.stats()["open"] == 0, DEADLINE_S, "both to be forgotten")


def test_a_base_station_that_is_away_ends_the_node_s_connection(bench: Bench) -> None:
    bench.door.close()
    node = socket.create_connection((HOST, bench.links.ports["near"]))
    with closing(node):
        node.settimeout(DEADLINE_S)
        assert ended(node)
    until(lambda: bench.links.stats()["open"] == 0, DEADLINE_S, "it to be forgotten")


def test_a_cut_ends_connections_and_refuses_new_ones_until_restored(bench: Bench) -> None:
    cut_off, other = bench.connect("near"), bench.connect("far")
    for _ in range(2):  # twice is once
        bench.links.cut("near")
    assert all(ended(end) for end in cut_off)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, bench.links.ports["near"]))
    assert all(is_silent(end) for end in other)
    for _ in range(2):
        bench.links.restore("near")
    node, station = bench.connect("near")
    node.sendall(b"back")
    assert receive(station, 4) == b"back"


def test_a_stall_keeps_connections_open_and_moves_nothing(bench: Bench) -> None:
    pairs = [bench.connect("near"), bench.connect("near")]
    bench.links.stall("near")
    pairs.append(bench.connect("near"))
    for node, station in pairs:
        node.sendall(b"up")
        station.sendall(b"down")
    pairs[1][0].close()  # which nobody learns meanwhile
    until(lambda: bench.links.stats()["queued_bytes"] == 6 * len(pairs), DEADLINE_S, "the relay to have taken it all")
    assert all(is_silent(end) for pair in pairs for end in pair if end.fileno() >= 0)
    other_node, other_station = bench.connect("far")
    other_node.sendall(b"moves")
    assert receive(other_station, 5) == b"moves"
    bench.links.resume("near")
    for node, station in pairs:
        assert receive(station, 2) == b"up"
        if node.fileno() >= 0:
            assert receive(node, 4) == b"down"
    assert ended(pairs[1][1])


def test_a_reset_is_a_tcp_reset_and_a_new_connection_is_welcome(bench: Bench) -> None:
    ends = bench.connect()
    bench.links.reset("near")
    for end in ends:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    node, station = bench.connect()
    station.sendall(b"again")
    assert receive(node, 5) == b"again"


class ZmqBench:
    """A base station and two nodes of the project, joined by emulated links."""

    def __init__(self, stack: ExitStack, folder: Path, secure: bool) -> None:
        keys, near, far = (make_pair() for _ in range(3)) if secure else (None, None, None)
        allow = AllowList({near.public: "near", far.public: "far"}) if near and far else None
        self.stack, self.record = stack, folder / "links.parquet"
        self.station = StationSocket(HOST, 0, keys, allow)
        stack.callback(self.station.close)
        self.links = stack.enter_context(LinkEmulator(DEVICES, (HOST, self.station.port), "fdd", self.record))
        self.nodes = [self._node(name, pair, keys) for name, pair in zip(DEVICES, (near, far), strict=True)]

    def _node(self, name: str, pair: KeyPair | None, station: KeyPair | None) -> NodeSocket:
        endpoint = f"tcp://{HOST}:{self.links.ports[name]}"
        node = NodeSocket(endpoint, pair, station.public if station is not None else None)
        self.stack.callback(node.close, linger_ms=0)
        return node

    def send_up(self, node: NodeSocket, *frames: bytes) -> bytes:
        """Until it gets through; the node's routing id."""

        def sent() -> bool:
            with suppress(zmq.Again):
                node.socket.send_multipart(frames, zmq.DONTWAIT)
                return True
            return False

        until(sent, DEADLINE_S, "a connection")
        received = until(lambda: self.station.receive(10), DEADLINE_S, "the message")
        assert [part.bytes for part in received[1:]] == list(frames)
        return bytes(received[0].bytes)

    def send_down(self, node: NodeSocket, routing_id: bytes, *frames: bytes) -> None:
        self.station.socket.send_multipart([routing_id, *frames])
        received = until(lambda: node.receive(10), DEADLINE_S, "the message")
        assert [part.bytes for part in received] == list(frames)


HEAD_BYTES = {False: 0, True: 8 + 8 + 16 + 1}  # of CURVE: command name, nonce, authenticator, flags


def on_wire(size_bytes: int, secure: bool) -> int:
    body_bytes = size_bytes + HEAD_BYTES[secure]
    return body_bytes + (9 if body_bytes > 255 else 2)


@pytest.mark.parametrize("secure", [False, True], ids=["insecure", "curve"])
def test_the_record_s_frames_are_the_messages_sent(stack: ExitStack, tmp_path: Path, secure: bool) -> None:
    bench = ZmqBench(stack, tmp_path, secure)
    routing_ids = [bench.send_up(node, b"hello, I am a node") for node in bench.nodes]
    bench.links.set_links(1, 50e6, 25e6, 0.002)
    sizes = [(80, 1000), (81, 65536), (82, 200_000)]
    for node, routing_id in zip(bench.nodes, routing_ids, strict=True):
        for head, body in sizes:
            bench.send_down(node, routing_id, bytes(head), bytes(body))
            bench.send_up(node, bytes(head), bytes(body))
    bench.links.close()
    rows = read_record(bench.record).to_pylist()
    sent = [on_wire(size, secure) for pair in sizes for size in pair]
    for device in range(2):
        for direction, rate in ((DOWN, 50e6), (UP, 25e6)):
            ours = [r for r in rows if (r["device"], r["direction"], r["prompt"]) == (device, direction, 1)]
            found = [r for r in ours if r["bytes"] in sent]  # heartbeats are there too
            assert [r["bytes"] for r in found] == sent
            assert [r["air_ns"] for r in found] == [pytest.approx(size * 8e9 / rate) for size in sent]
            if not secure:
                assert [r["flags"] & 1 for r in found] == [1, 0] * len(sizes), "a header, and more to come"
    assert {row["flags"] for row in rows} >= {255, 2}
    assert {row["prompt"] for row in rows} == {-1, 1}, "handshakes are recorded as well"


def test_a_node_comes_back_by_itself_after_a_cut(stack: ExitStack, tmp_path: Path) -> None:
    bench = ZmqBench(stack, tmp_path, secure=True)
    node = bench.nodes[0]
    bench.send_up(node, b"before")
    node.events(), bench.station.events()
    bench.links.cut("near")
    for end in (node, bench.station):
        until(
            lambda end=end: any(e.event == zmq.EVENT_DISCONNECTED for e in end.events()),
            DEADLINE_S,
            "the disconnection",
        )
    bench.links.restore("near")

    def gets_through() -> bool:
        with suppress(zmq.Again):  # not there yet; and ZeroMQ may lose what is sent just after a disconnection
            node.socket.send(b"after", zmq.DONTWAIT)
        received = bench.station.receive(10)
        return received is not None and received[1].bytes == b"after"

    until(gets_through, DEADLINE_S, "a message over a new connection")


@pytest.mark.parametrize(
    ("down_up_delay", "complaint"),
    [
        ([[1e6, 0], 1e6], "down rate of far is 0.0 bit/s: it must be above 0"),
        ([1e6, float("nan")], "up rate of near is nan bit/s: it must be above 0"),
        ([1e6, -1], "up rate of near is -1.0 bit/s: it must be above 0"),
        ([1, 1, -1], "delay of near is -1.0 s: it must be finite and at least 0"),
        ([1, 1, [0, float("inf")]], "delay of far is inf s: it must be finite and at least 0"),
        ([[1, 2, 3], 1], r"\[1, 2, 3\] is not one value for each of 2 devices"),
    ],
)
def test_impossible_links_are_refused_in_one_line(
    shared_links: LinkEmulator, down_up_delay: list[Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^links: {complaint}"):
        shared_links.set_links(1, *down_up_delay)


@pytest.fixture(scope="module")
def shared_links() -> Iterator[LinkEmulator]:
    with LinkEmulator(DEVICES, (HOST, 9), "fdd") as links:
        yield links


def test_an_unknown_device_is_refused_by_name(shared_links: LinkEmulator) -> None:
    for act in (shared_links.cut, shared_links.restore, shared_links.stall, shared_links.resume, shared_links.reset):
        with pytest.raises(ConfigError, match=r"^links: no device 'nobody'; there are near, far$"):
            act("nobody")


def test_what_cannot_be_started_is_refused_in_one_line() -> None:
    running = multiprocessing.active_children()
    with pytest.raises(ConfigError, match=r"^medium = 'radio': not one of fdd, tdd, shared$"):
        LinkEmulator(DEVICES, (HOST, 9), "radio")
    with pytest.raises(ConfigError, match="both must be at least 1"):
        LinkEmulator(DEVICES, (HOST, 9), "fdd", quantum_bytes=0)
    with pytest.raises(ConfigError, match=r"^cannot listen on 192\.0\.2\.1: .*: give an address of this machine$"):
        LinkEmulator(DEVICES, (HOST, 9), "fdd", host="192.0.2.1")
    assert multiprocessing.active_children() == running


def test_a_record_that_cannot_be_written_is_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    links = LinkEmulator(DEVICES, (HOST, 9), "fdd", tmp_path / "no folder" / "links.parquet")
    with pytest.raises(RunLogError, match=r"links\.parquet: cannot be written"):
        links.close()
    assert links._process.exitcode == 0


def test_closing_takes_connections_along_and_twice_is_once(bench: Bench) -> None:
    node, station = bench.connect()
    for _ in range(2):
        bench.links.close()
    assert ended(node)
    assert ended(station)
    assert bench.links._process.exitcode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, bench.links.ports["near"]))


def test_a_relay_that_was_killed_is_one_line() -> None:
    links = LinkEmulator(DEVICES, (HOST, 9), "fdd")
    links._process.kill()
    with pytest.raises(WdmoeError, match=r"^the link emulator has ended \(exit code -9\): start the run again$"):
        links.cut("near")
    with pytest.raises(WdmoeError, match="has ended"):
        links.close()


def test_ctrl_c_does_not_end_the_relay_and_sigterm_does_with_its_record(bench: Bench) -> None:
    pid = bench.links._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    node, station = bench.connect()
    node.sendall(GREETING)
    assert receive(station, 64) == GREETING
    until(lambda: bench.links.stats()["frames"] == 1, DEADLINE_S, "it to be noted")
    os.kill(pid, signal.SIGTERM)
    bench.links._process.join(DEADLINE_S)
    assert read_record(bench.record)["bytes"].to_pylist() == [64]
    with pytest.raises(WdmoeError, match="has ended"):
        bench.links.close()


PARENT = """
import sys, time
from pathlib import Path
from testbed.channel.link_emulator import LinkEmulator
links = LinkEmulator(["near"], ("127.0.0.1", 9), "fdd", Path(sys.argv[1]))
loaded = sorted({"torch", "zmq", "transformers"} & set(sys.modules))
print(f'{{"pid": {links._process.pid}, "port": {links.ports["near"]}, "loaded": {len(loaded)}}}', flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead, and not yet buried
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_parent_killed_by_force_takes_the_relay_along(tmp_path: Path) -> None:
    record = tmp_path / "links.parquet"
    command = [sys.executable, "-c", PARENT, str(record)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        told = json.loads(parent.stdout.readline())
        socket.create_connection((HOST, told["port"])).close()
        parent.kill()
    until(lambda: not is_running(told["pid"]), DEADLINE_S, "the relay's end")
    assert read_record(record).num_rows == 0
    assert told["loaded"] == 0, "neither torch nor zmq"
