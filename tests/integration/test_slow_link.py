"""A large block over a slow link is only slow: nobody takes the node at its other end for lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rack import HOST, Rack, rack
from splits import write_split

from bs_node.blocks import Block, group
from jetson_node.experts import ffn_numpy
from testbed.checkpoint.ffn import FfnSpec
from testbed.runlog.schema import Status

BYTES_PER_S = 2e6 / 8  # 2 Mbit/s each way
PIECE_BYTES, ROOM_BYTES = 8192, 65536
TOKENS = 4096
WIDTH = 64  # fp32: 1 MiB and 4.2 s each way; the demo model's 192 would take 25 s in all
Weights = dict[tuple[int, int], dict[str, Any]]  # (layer, expert) -> its tensors
SPEC = FfnSpec(width=WIDTH, inner=32, has_gate=True, act="silu")


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on at the link's rate until either end is closed."""
    free_at_s = 0.0
    with suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            free_at_s = max(free_at_s, time.monotonic()) + len(piece) / BYTES_PER_S
            time.sleep(max(0.0, free_at_s - time.monotonic()))  # the link itself, not a wait for something
            sink.sendall(piece)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class SlowLink:
    """A relay with little room of its own, so that its slowness reaches the sender."""

    def __init__(self) -> None:
        self._door = socket.create_server((HOST, 0))
        self._door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM_BYTES)
        self._threads: list[Thread] = []
        self.connections = 0

    def lead_to(self, port: int) -> int:
        """Let connections in for this port; the port where they come in."""
        self._start(self._let_in, port)
        return int(self._door.getsockname()[1])

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _let_in(self, port: int) -> None:
        with suppress(OSError):  # the door was shut
            while True:
                near, _ = self._door.accept()
                self.connections += 1
                self._start(self._join, near, port)

    def _join(self, near: socket.socket, port: int) -> None:
        with near, socket.create_connection((HOST, port)) as far:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM_BYTES)
            up = Thread(target=carry, args=(near, far))
            up.start()
            carry(far, near)
            up.join()

    def close(self) -> None:
        """Let nobody else in, and wait until both ends of every connection have closed."""
        self._door.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._door.close()


@contextmanager
def far_node(folder: Path) -> Iterator[tuple[Rack, SlowLink, Weights]]:
    """A rack whose only node is at the other end of a slow link; it holds two experts of these weights."""
    _, weights = write_split(folder / "split", SPEC, devices=["far"], layers=1, experts=2)
    with (
        closing(SlowLink()) as link,
        rack(folder / "split", folder, port_for_nodes=link.lead_to, arguments=["--backend", "numpy"]) as nodes,
    ):
        yield nodes, link, weights


def rows_for(tokens: int) -> tuple[NDArray[np.float32], list[Block]]:
    """hidden_TD and the one block of it that the node gets: even tokens to expert 0, odd ones to expert 1."""
    expert_T1 = (np.arange(tokens) % 2)[:, None]
    hidden_TD = np.random.default_rng(1).standard_normal((tokens, WIDTH)).astype(np.float32)
    return hidden_TD, group(expert_T1, np.zeros_like(expert_T1), devices=1, experts=2)


def test_4096_tokens_in_fp32_pass_a_link_of_2_mbit_per_s_without_a_disconnect(tmp_path: Path) -> None:
    hidden_TD, blocks = rows_for(TOKENS)
    with far_node(tmp_path) as (nodes, link, weights):
        started_s = time.monotonic()
        (outcome,), _ = nodes.wireless().exchange(0, 0, hidden_TD, blocks)
        took_s = time.monotonic() - started_s
    assert outcome.status is Status.ANSWERED
    assert took_s > 0.9 * (outcome.bytes_down + outcome.bytes_up) / BYTES_PER_S, "the link was as slow as it should be"
    assert link.connections == 1
    assert [kind for kind, _ in nodes.listening.events if kind != "telemetry"] == ["node_joined"]
    assert outcome.output is not None
    output_RD = np.zeros((TOKENS, WIDTH), np.float32)
    outcome.output.accumulate(slice(0, TOKENS), np.ones(TOKENS, np.float32), np.arange(TOKENS), output_RD)
    for expert, rows in ((0, slice(0, TOKENS // 2)), (1, slice(TOKENS // 2, TOKENS))):
        expected_RD = ffn_numpy(hidden_TD[outcome.block.token_R[rows]], weights[0, expert], SPEC)
        np.testing.assert_allclose(output_RD[rows], expected_RD, rtol=1e-5, atol=1e-5)


def test_the_same_tokens_in_one_message_do_not_pass_it(tmp_path: Path) -> None:
    """ZeroMQ counts complete messages only: this is what parts are for."""
    hidden_TD, blocks = rows_for(TOKENS)
    with far_node(tmp_path) as (nodes, _, _):
        (outcome,), _ = nodes.wireless(part_bytes=2**21).exchange(0, 0, hidden_TD, blocks)
        assert outcome.status is Status.LOST
        assert nodes.listening.told("node_lost")
