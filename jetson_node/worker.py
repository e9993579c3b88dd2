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
from testbed.wire.parts import MAX_BLOCK_BYTES, Assembler, part_count, part_rows
from testbed.wire.quantization import SCHEMES, quantise

CREDITS_PER_WINDOW = 4

Figures = Callable[[], dict[str, float | None]]


class ComputeTimes(NamedTuple):
    """Stamps of one block on the node's clock, and where its time went, in nanoseconds."""

    received_ns: int  # last part of the request read
    complete_ns: int  # ... and dequantised
    queue_ns: int
    dequantise_ns: int
    compute_ns: int
    padding_ns: int


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
        key = (part.run, part.round, part.attempt)
        if self._block is None or key != self._block_key:  # a new block: whatever was left of an older one is void
            self._experts.check(part.layer, part.segments, part.rows, part.width)
            self._block = Assembler(part, self._requests, self._max_block_bytes)
            self._block_key, self._credited_bytes, self._dequantise_ns = key, 0, 0
        started_ns = time.monotonic_ns()
        complete = self._block.add(part, payload)
        done_ns = time.monotonic_ns()
        self._dequantise_ns += done_ns - started_ns
        if complete:
            block, self._block = self._block, None
            self._serve(part, block, started_ns, done_ns)
        else:
            self._credit(part, self._block)

    def _credit(self, part: RequestPart, block: Assembler) -> None:
        """A few times per window, and only for a block that the window would stop."""
        window_bytes = self._link.window_bytes
        if block.total_bytes <= window_bytes:
            return
        if (block.payload_bytes - self._credited_bytes) * CREDITS_PER_WINDOW >= window_bytes:
            self._credited_bytes = block.payload_bytes
            self._link.send(Credit(part.round, part.attempt, self._credited_bytes))

    def _serve(self, request: RequestPart, block: Assembler, received_ns: int, complete_ns: int) -> None:
        emulated_s = self._pacing.seconds(request.rows, len(request.segments))
        self._announce(request, emulated_s)
        started_ns = time.monotonic_ns()
        output_RD = self._experts.compute(request.layer, request.segments, block.block_RD)
        computed_ns = time.monotonic_ns()
        self._learn(request.rows, computed_ns - started_ns)
        padding_ns = self._pad(emulated_s, started_ns, computed_ns)
        times = ComputeTimes(
            received_ns=received_ns,
            complete_ns=complete_ns,
            queue_ns=started_ns - complete_ns,  # parts before the last are dequantised while the others travel
            dequantise_ns=self._dequantise_ns,
            compute_ns=computed_ns - started_ns,
            padding_ns=padding_ns,
        )
        self._reply(request, output_RD, times, block.payload_bytes)

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

    def _reply(
        self, request: RequestPart, output_RD: NDArray[np.float32], times: ComputeTimes, bytes_down: int
    ) -> None:
        scheme = SCHEMES[request.reply_scheme]
        quantise_started_ns = time.monotonic_ns()
        rows_RB = quantise(output_RD, scheme, self._quantised, request.padded_width)
        sent_ns = time.monotonic_ns()
        parts = part_count(request.rows, scheme.bytes_per_value * request.padded_width, self._part_bytes)
        first = ReplyPart(
            request.run, request.round, request.attempt, 0, parts, request.rows, request.width, request.padded_width,
            scheme.name, times.received_ns, sent_ns, times.queue_ns, times.dequantise_ns, times.compute_ns,
            times.padding_ns, sent_ns - quantise_started_ns, self._experts.staging_ns,
        )  # fmt: skip
        experts = len(request.segments)
        self._rows.computed(first, request.layer, experts, times.complete_ns, bytes_down, rows_RB.nbytes)
        for number in range(parts):
            header = encode(replace(first, part=number) if number else first)
            if not self._link.send_part(header, rows_RB[part_rows(request.rows, parts, number)]):
                return  # the connection is gone, and with it whoever asked
        self._rows.sent()
