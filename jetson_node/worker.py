"""The node's one loop: receive, dequantise, compute, quantise, reply.

Heartbeats come from this same loop, so a node that hangs falls silent. Nothing is kept from one block to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from jetson_node.experts import Experts
from jetson_node.link import Link
from jetson_node.pacing import Pacing
from jetson_node.rows import Rows
from testbed.errors import MessageError
from testbed.wire.kept import KeptRows
from testbed.wire.messages import Announce, Credit, Heartbeat, Rejected, ReplyPart, RequestPart, encode
from testbed.wire.parts import MAX_BLOCK_BYTES, Assembler, part_count, part_rows, whole_block
from testbed.wire.quantization import SCHEMES, quantise

CREDITS_PER_WINDOW = 4

Figures = Callable[[], dict[str, float | None]]


class Received(NamedTuple):
    """A whole block, and when it came on the node's clock."""

    block_RD: NDArray[np.float32]
    payload_bytes: int
    last_ns: int  # the last part was read ...
    complete_ns: int  # ... and dequantised
    dequantise_ns: int  # of all parts: those before the last are dequantised while the others travel


class Worker:
    """Computes blocks for the base station at the other end of `link` until it says goodbye.

    `pacing` says how long a block's compute must take at least: the worker sleeps after the real work.
    `stop` is asked between blocks; `figures` gives what a heartbeat reports; `rows` keeps what became of each block.
    """

    def __init__(
        self,
        link: Link,
        experts: Experts,
        *,
        figures: Figures,
        stop: Callable[[], bool],
        pacing: Pacing | None = None,
        rows: Rows | None = None,
        part_bytes: int = 65536,
        max_block_bytes: int = MAX_BLOCK_BYTES,
    ) -> None:
        self._link, self._experts = link, experts
        self._figures, self._stop = figures, stop
        self._pacing = pacing or Pacing(None)
        self._rows = rows or Rows()
        self._part_bytes, self._max_block_bytes = part_bytes, max_block_bytes
        self._requests, self._quantised = KeptRows(np.float32), KeptRows(np.uint8)
        self._block: Assembler | None = None
        self._block_key = (-1, -1, -1)
        self._credited_bytes = 0
        self._dequantise_ns = 0
        self._row_ns = 0.0  # running mean of compute time per row: the estimate announced before a long block

    def run(self) -> None:
        """Serve until goodbye, until `stop`, or until the base station refuses us (RefusedError)."""
        while not (self._stop() or self._link.over):
            if self._link.keep():
                self._link.send(Heartbeat(time.monotonic_ns(), self._figures(), self._link.echoed))
            received = self._link.receive()
            if received is None:
                self._rows.rest()
                continue
            part, payload = received
            try:
                self._take(part, payload)
            except MessageError as error:
                self._block = None
                self._rows.refused(part)
                self._link.send(Rejected(part.round, part.attempt, str(error)[:500]))

    def _take(self, part: RequestPart, payload: memoryview) -> None:
        """Add a part to its block; a part of another block than before voids what was left of that."""
        key = (part.run, part.round, part.attempt)
        if self._block is None or key != self._block_key:
            self._experts.check(part.layer, part.segments, part.rows, part.width)
            if part.parts == 1:
                self._block = None
                self._take_whole(part, payload)
                return
            self._block = Assembler(part, self._requests, self._max_block_bytes)
            self._block_key, self._credited_bytes, self._dequantise_ns = key, 0, 0
        block, started_ns = self._block, time.monotonic_ns()
        complete = block.add(part, payload)
        done_ns = time.monotonic_ns()
        self._dequantise_ns += done_ns - started_ns
        if complete:
            self._block = None
            self._serve(part, Received(block.block_RD, block.payload_bytes, started_ns, done_ns, self._dequantise_ns))
        else:
            self._credit(part, block)

    def _take_whole(self, request: RequestPart, payload: memoryview) -> None:
        started_ns = time.monotonic_ns()
        block_RD = whole_block(request, payload, self._requests, self._max_block_bytes)
        done_ns = time.monotonic_ns()
        self._serve(request, Received(block_RD, len(payload), started_ns, done_ns, done_ns - started_ns))

    def _credit(self, part: RequestPart, block: Assembler) -> None:
        """A few times per window, and only for a block that the window would stop."""
        window_bytes = self._link.window_bytes
        if block.total_bytes <= window_bytes:
            return
        if (block.payload_bytes - self._credited_bytes) * CREDITS_PER_WINDOW >= window_bytes:
            self._credited_bytes = block.payload_bytes
            self._link.send(Credit(part.round, part.attempt, self._credited_bytes))

    def _serve(self, request: RequestPart, received: Received) -> None:
        emulated_s = self._pacing.seconds(request.rows, len(request.segments))
        self._announce(request, emulated_s)
        started_ns = time.monotonic_ns()
        output_RD = self._experts.compute(request.layer, request.segments, received.block_RD)
        computed_ns = time.monotonic_ns()
        compute_ns = computed_ns - started_ns
        self._learn(request.rows, compute_ns)
        padding_ns = self._pad(emulated_s, started_ns, computed_ns) if emulated_s else 0
        scheme = SCHEMES[request.reply_scheme]
        quantise_started_ns = time.monotonic_ns()
        rows_RB = quantise(output_RD, scheme, self._quantised, request.padded_width)
        sent_ns = time.monotonic_ns()
        parts = part_count(request.rows, scheme.bytes_per_value * request.padded_width, self._part_bytes)
        first = ReplyPart(
            request.run, request.round, request.attempt, 0, parts, request.rows, request.width, request.padded_width,
            request.reply_scheme, received.last_ns, sent_ns, started_ns - received.complete_ns, received.dequantise_ns,
            compute_ns, padding_ns, sent_ns - quantise_started_ns, self._experts.staging_ns,
        )  # fmt: skip
        self._rows.computed(first, request, received.complete_ns, received.payload_bytes, rows_RB.nbytes)
        if self._reply(first, rows_RB):
            self._rows.sent()

    def _announce(self, request: RequestPart, emulated_s: float) -> None:
        """Only a block that outlasts a heartbeat needs announcing; on a fast one it would cost more than it tells."""
        estimate_ns = int(max(request.rows * self._row_ns, emulated_s * 1e9))
        if self._row_ns == 0.0 or estimate_ns > self._link.heartbeat_ns:
            self._link.send(Announce(request.round, request.rows, estimate_ns))

    def _learn(self, rows: int, compute_ns: int) -> None:
        measured = compute_ns / rows
        self._row_ns = measured if self._row_ns == 0.0 else 0.8 * self._row_ns + 0.2 * measured

    def _pad(self, emulated_s: float, started_ns: int, computed_ns: int) -> int:
        """Sleep until the emulated device would be done; 0 where the real work already took longer."""
        due_ns = started_ns + int(emulated_s * 1e9)
        if due_ns > computed_ns:
            time.sleep((due_ns - computed_ns) / 1e9)
            return time.monotonic_ns() - computed_ns
        return 0

    def _reply(self, first: ReplyPart, rows_RB: NDArray[np.uint8]) -> bool:
        """Send all parts. False when the connection is gone, and with it whoever asked."""
        if first.parts == 1:
            return self._link.send_part(encode(first), rows_RB)
        return all(
            self._link.send_part(encode(replace(first, part=part)), rows_RB[part_rows(first.rows, first.parts, part)])
            for part in range(first.parts)
        )
