"""What a node makes of the parts that it is sent, over a real socket: whole blocks are answered, each for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import until
from rack import Listening, base_station
from splits import DEVICES, write_split

from bs_node.station import Mail
from jetson_node.link import Link
from jetson_node.worker import Worker
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import manifest_hash
from testbed.errors import MessageError
from testbed.wire.keys import read_pair, read_public
from testbed.wire.messages import PROTOCOL_VERSION, Hello, Rejected, ReplyPart, RequestPart, encode
from testbed.wire.parts import part_rows
from testbed.wire.sockets import NodeSocket

SPEC = FfnSpec(width=8, inner=8, has_gate=True, act="silu")
RUN, ROWS, ANSWER_S = 1, 4, 10.0
Float32 = NDArray[np.float32]


class NegatingExperts:
    """Layer 0 only; its experts change every row's sign, so that an answer tells what was asked."""

    backend, staging_ns = "negating", None

    def check(self, layer: int, segments: Sequence[tuple[int, int]], rows: int, width: int) -> None:  # noqa: ARG002
        if layer != 0:
            raise MessageError(f"layer {layer} is not here")

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Float32) -> Float32:  # noqa: ARG002
        return -x_RD

    def warm_up(self) -> None:
        """Nothing to warm."""


class Asked:
    """A node that runs in a thread, and the base station that asks it."""

    def __init__(self, listening: Listening) -> None:
        self.station = listening.station
        self.node = self.station.registry.nodes[0]

    def send(self, number: int, parts: int, *which: int, layer: int = 0) -> None:
        """These parts of block `number`, whose rows hold its number."""
        x_RD = np.full((ROWS, SPEC.width), number, np.float32)
        for part in which:
            request = RequestPart(
                RUN, number, 0, layer, part, parts, ROWS, SPEC.width, SPEC.width, "fp32", "fp32", [(0, ROWS)]
            )
            rows_RB = x_RD[part_rows(ROWS, parts, part)].view(np.uint8)
            assert self.station.send(self.node, encode(request), rows_RB)

    def answer(self) -> tuple[ReplyPart | Rejected, Float32]:
        mails: list[Mail] = []

        def has_come() -> bool:
            mail = self.station.receive(20)
            mails.extend([] if mail is None else [mail])
            return mail is not None

        until(has_come, ANSWER_S, "an answer")
        (mail,) = mails
        assert isinstance(mail.message, (ReplyPart, Rejected))
        return mail.message, np.frombuffer(mail.payload, np.float32).reshape(-1, SPEC.width)

    def is_answered(self, number: int) -> bool:
        """The next answer is this block's, and right."""
        message, y_RD = self.answer()
        return isinstance(message, ReplyPart) and message.round == number and bool((y_RD == -number).all())


@contextmanager
def asked_node(folder: Path) -> Iterator[Asked]:
    manifest, _ = write_split(folder / "split", SPEC)
    name, over = DEVICES[0], Event()
    with base_station(manifest, folder) as listening:
        keys = listening.keys / name
        hello = Hello(PROTOCOL_VERSION, name, 1, manifest_hash(manifest), manifest.held_counts(name), {})
        endpoint = f"tcp://127.0.0.1:{listening.port}"
        link = Link(lambda: NodeSocket(endpoint, read_pair(keys, name), read_public(keys / "bs.pub")), hello, 30.0)
        thread = Thread(target=Worker(link, NegatingExperts(), figures=dict, stop=over.is_set).run)
        thread.start()
        try:
            until(lambda: listening.station.receive(20) or listening.told("node_joined"), ANSWER_S, "the node")
            yield Asked(listening)
        finally:
            over.set()
            thread.join(10)
            link.close()


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    with asked_node(tmp_path) as it:
        yield it


def test_a_block_of_one_part_and_one_of_several_in_any_order_are_answered_alike(asked: Asked) -> None:
    asked.send(1, 1, 0)
    assert asked.is_answered(1)
    asked.send(2, 4, 2, 0, 3, 1)
    assert asked.is_answered(2)


@pytest.mark.parametrize("parts", [1, 2], ids=["of one part", "of two"])
def test_a_block_that_comes_amid_another_voids_what_was_there_of_that(asked: Asked, parts: int) -> None:
    asked.send(1, 2, 0)
    asked.send(2, parts, *range(parts))
    assert asked.is_answered(2)
    asked.send(1, 2, 1)  # alone: the other half is gone
    asked.send(3, 1, 0)
    assert asked.is_answered(3)
    asked.send(1, 2, 0, 1)
    assert asked.is_answered(1)


def test_what_cannot_be_is_rejected_in_a_line_and_the_next_block_is_answered(asked: Asked) -> None:
    asked.send(1, 1, 0, layer=5)
    message, _ = asked.answer()
    assert isinstance(message, Rejected)
    assert message.reason == "layer 5 is not here"
    asked.send(2, 2, 0)
    asked.send(2, 1, 0)  # says otherwise than its first part
    message, _ = asked.answer()
    assert isinstance(message, Rejected)
    assert "contradicts the first part" in message.reason
    asked.send(3, 1, 0)
    assert asked.is_answered(3)
