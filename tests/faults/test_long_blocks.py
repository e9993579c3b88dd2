"""A node that computes for long says so before, and is only suspected once that time is over."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import numpy as np
from processes import until
from rack import SILENCE_S, base_station, rack
from splits import DEVICES, write_split

from bs_node.blocks import Block, Float32
from bs_node.wireless import WirelessDispatcher, WireSettings
from jetson_node.link import Link
from jetson_node.pacing import Pacing
from jetson_node.worker import Worker
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.latency.model import ComputeModel
from testbed.runlog.schema import Status
from testbed.wire.keys import read_pair, read_public
from testbed.wire.messages import PROTOCOL_VERSION, Hello
from testbed.wire.sockets import NodeSocket

SPEC = FfnSpec(width=8, inner=8, has_gate=True, act="silu")
ANNOUNCED_S = 2.0
FOUND_WITHIN_S = 3.0  # after the announced time
SCHEDULING_S = 0.5  # a busy machine may be late by so much


def slow_nodes(row_s: float) -> list[str]:
    return ["--backend", "numpy", "--emulated-row-s", str(row_s)]


def block_of(manifest: Manifest, rows: int) -> tuple[Float32, list[Block]]:
    """Rows for the first expert of the first device."""
    token_R = np.arange(rows)
    expert = int(manifest.holds_NE(0)[0].argmax())
    hidden_TD = np.ones((rows, SPEC.width), np.float32)
    return hidden_TD, [Block(0, token_R, np.zeros(rows, np.int64), [(expert, rows)])]


def test_a_block_of_ten_seconds_is_not_taken_for_a_hang(tmp_path: Path) -> None:
    write_split(tmp_path / "split", SPEC)
    with rack(tmp_path / "split", tmp_path, arguments=slow_nodes(5.0)) as nodes:
        hidden_TD, blocks = block_of(nodes.manifest, 2)
        (outcome,), _ = nodes.wireless().exchange(0, 0, hidden_TD, blocks)
        assert outcome.status is Status.ANSWERED
        assert outcome.node_compute_ns is not None
        assert outcome.node_compute_ns >= 10 * 10**9 > SILENCE_S * 10**9
        assert nodes.listening.told("node_lost") == []


def test_a_frozen_process_is_found_within_three_seconds_after_its_announced_time(tmp_path: Path) -> None:
    write_split(tmp_path / "split", SPEC)
    with rack(tmp_path / "split", tmp_path, arguments=slow_nodes(ANNOUNCED_S / 2)) as nodes:
        process = nodes.fleet.nodes[0].process
        assert process is not None
        assert process.pid is not None
        hidden_TD, blocks = block_of(nodes.manifest, 2)
        freeze = Timer(0.5, os.kill, (process.pid, signal.SIGSTOP))  # while it computes
        started_s = time.monotonic()
        freeze.start()
        try:
            (outcome,), _ = nodes.wireless().exchange(0, 0, hidden_TD, blocks)
            took_s = time.monotonic() - started_s
        finally:
            freeze.join()
            os.kill(process.pid, signal.SIGCONT)
        assert outcome.status is Status.LOST
        assert [facts["device"] for facts in nodes.listening.told("node_lost")] == [DEVICES[0]]
        assert took_s < ANNOUNCED_S + FOUND_WITHIN_S + SCHEDULING_S


class HangingExperts:
    """Compute hangs until it is let go; the connection's own threads live on, as they do in a driver that hangs."""

    backend = "hanging"
    staging_ns = None

    def __init__(self) -> None:
        self.let_go = Event()

    def check(self, layer: int, segments: Any, rows: int, width: int) -> None:
        """Everything is taken."""

    def compute(self, _layer: int, _segments: Any, x_RD: Float32) -> Float32:
        self.let_go.wait(60)
        return x_RD

    def warm_up(self) -> None:
        """Nothing to warm."""


def test_a_compute_loop_that_hangs_is_found_within_three_seconds_after_its_announced_time(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path / "split", SPEC)
    experts, name = HangingExperts(), DEVICES[0]
    with base_station(manifest, tmp_path) as listening:
        keys = listening.keys / name
        hello = Hello(PROTOCOL_VERSION, name, 1, manifest_hash(manifest), manifest.held_counts(name), {})
        endpoint = f"tcp://127.0.0.1:{listening.port}"
        link = Link(lambda: NodeSocket(endpoint, read_pair(keys, name), read_public(keys / "bs.pub")), hello, 30.0)
        pacing = Pacing(ComputeModel(0.0, 0.0, ANNOUNCED_S / 2))
        worker = Worker(link, experts, figures=dict, stop=experts.let_go.is_set, pacing=pacing)
        thread = Thread(target=worker.run)
        thread.start()
        try:
            until(lambda: listening.station.receive(20) or listening.told("node_joined"), 10, "the node")
            hidden_TD, blocks = block_of(manifest, 2)
            settings = WireSettings("fp32", "fp32", 65536, 2**20, 0, 60.0)
            started_s = time.monotonic()
            dispatcher = WirelessDispatcher(listening.station, settings)
            (outcome,), _ = dispatcher.exchange(0, 0, hidden_TD, blocks)
            took_s = time.monotonic() - started_s
        finally:
            experts.let_go.set()
            thread.join(10)
            link.close()
        assert outcome.status is Status.LOST
        assert [facts["how"] for facts in listening.told("node_lost")] == ["silent"]
        assert ANNOUNCED_S < took_s < ANNOUNCED_S + FOUND_WITHIN_S + SCHEDULING_S
