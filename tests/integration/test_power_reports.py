"""Power and telemetry from a heartbeat to an event, over a real socket. The node is a socket, its board synthetic."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from processes import until
from rack import Listening, base_station
from splits import DEVICES, write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.wire.keys import read_pair, read_public
from testbed.wire.messages import PROTOCOL_VERSION, Heartbeat, Hello, Welcome, decode_from_base_station, encode
from testbed.wire.sockets import NodeSocket

NODE = DEVICES[0]
S = 10**9
NODE_NS = 500_000 * S  # its clock is another one


class FakeNode:
    """Says hello and beats; its clock goes as it is told."""

    def __init__(self, listening: Listening, manifest: Manifest, boot_id: int = 1) -> None:
        self._listening = listening
        self._hello = Hello(PROTOCOL_VERSION, NODE, boot_id, manifest_hash(manifest), manifest.held_counts(NODE), {})
        keys = listening.keys / NODE
        endpoint = f"tcp://127.0.0.1:{listening.port}"
        self._node = NodeSocket(endpoint, read_pair(keys, NODE), read_public(keys / "bs.pub"))

    def join(self) -> None:
        until(lambda: self._node.socket.poll(20, zmq.POLLOUT), 10, "a connection")
        self._node.socket.send(encode(self._hello))
        until(lambda: self._listening.station.receive(20) or self._node.socket.poll(0), 10, "an answer")
        assert isinstance(decode_from_base_station(self._node.socket.recv()), Welcome)

    def beat(self, at_s: float, figures: dict[str, float | None]) -> None:
        """Send a heartbeat and wait for its echo: then it was heard."""
        self._node.socket.send(encode(Heartbeat(NODE_NS + int(at_s * S), figures)))
        until(lambda: self._listening.station.receive(20) or self._node.socket.poll(0), 10, "an echo")
        self._node.socket.recv()

    def close(self) -> None:
        self._node.close()


def board(power_w: float, age_s: float) -> dict[str, float | None]:
    return {"rss_bytes": 1e6, "tot_w": power_w, "board_age_s": age_s, "tot_rail:VDD_IN": 1.0}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_split(tmp_path / "split", FfnSpec(width=8, inner=8, has_gate=True, act="silu"))[0]


@pytest.fixture
def listening(manifest: Manifest, tmp_path: Path) -> Iterator[Listening]:
    with base_station(manifest, tmp_path) as station:
        yield station


def test_a_heartbeats_power_is_an_event_stamped_when_the_board_was_sampled(
    listening: Listening, manifest: Manifest
) -> None:
    node = FakeNode(listening, manifest)
    try:
        node.join()
        before_ns = time.monotonic_ns()
        node.beat(0.0, board(5.5, age_s=0.25))
        after_ns = time.monotonic_ns()
    finally:
        node.close()
    (facts,) = listening.told("power")
    assert (facts["device"], facts["power_w"]) == (NODE, 5.5)
    assert before_ns <= facts["sampled_ns"] + S // 4 <= after_ns
    assert listening.told("power_rail") == [{"device": NODE, "rail": "VDD_IN"}]


def test_a_stale_line_that_is_repeated_is_no_new_sample(listening: Listening, manifest: Manifest) -> None:
    node = FakeNode(listening, manifest)
    try:
        node.join()
        for at_s, figures in ((0.0, board(5.5, 0.2)), (0.5, board(5.5, 0.7)), (1.0, board(6.5, 0.2))):
            node.beat(at_s, figures)
        node.beat(9.0, board(6.5, 8.2))  # a sampler that is stuck
    finally:
        node.close()
    assert [facts["power_w"] for facts in listening.told("power")] == [5.5, 6.5]
    assert len(listening.told("power_rail")) == 1
    assert listening.told("broken_message") == []


def test_a_node_that_comes_back_tells_its_rail_again(listening: Listening, manifest: Manifest) -> None:
    for boot_id, at_s in ((1, 0.0), (2, 5.0)):
        node = FakeNode(listening, manifest, boot_id)
        try:
            node.join()
            node.beat(at_s, board(5.5, 0.2))
        finally:
            node.close()
    assert len(listening.told("power_rail")) == 2
    assert len(listening.told("power")) == 2


def test_figures_without_power_are_no_event(listening: Listening, manifest: Manifest) -> None:
    node = FakeNode(listening, manifest)
    try:
        node.join()
        node.beat(0.0, {"rss_bytes": 1e6, "tot_w": None, "board_age_s": 0.2})
    finally:
        node.close()
    assert listening.told("power") == listening.told("power_rail") == []


def test_a_board_s_figures_are_events_stamped_by_group_and_at_most_one_a_second(
    listening: Listening, manifest: Manifest
) -> None:
    node = FakeNode(listening, manifest)
    figures = {"rss_bytes": 1e6, "host_age_s": 0.5, "cpu_c": 46.0, "board_age_s": 0.25, "tot_w": 5.5}
    try:
        node.join()
        before_ns = time.monotonic_ns()
        node.beat(0.0, figures)
        after_ns = time.monotonic_ns()
        for beat in range(1, 20):
            node.beat(0.01 * beat, figures)
        spent_s = (time.monotonic_ns() - before_ns) / S
    finally:
        node.close()
    told = listening.told("telemetry")
    host, board = told[0]["samples"]
    assert (told[0]["device"], host["figures"], board["figures"]) == (NODE, {"rss_bytes": 1e6}, {"cpu_c": 46.0})
    assert before_ns <= host["sampled_ns"] + S // 2 <= after_ns
    assert before_ns <= board["sampled_ns"] + S // 4 <= after_ns
    assert len(told) <= 1 + spent_s / 0.95
