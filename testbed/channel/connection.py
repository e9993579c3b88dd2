"""A node's connection and the one onward to the base station, joined by the two directions of the device's link."""

from __future__ import annotations

import math
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

from testbed.channel.air import Lane, Link, Piece
from testbed.channel.record import DOWN, UP, Frame, Framing, LinkRecord, Route

READ_BYTES = 65536
PIECES_AT_ONCE = 64
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Parcel(Piece):
    """A piece and its bytes; the end of a stream is the one without any."""

    __slots__ = ("content", "ends_frame", "frame")

    def __init__(self, content: memoryview, frame: Frame | None, ends_frame: bool) -> None:
        super().__init__(len(content))
        self.content, self.frame, self.ends_frame = content, frame, ends_frame


class Stream(Lane[Parcel]):
    """One direction: what it reads from one socket waits, flies, and is written to the other."""

    def __init__(self, link: Link, source: socket.socket, sink: socket.socket, route: Route) -> None:
        super().__init__(link)
        self.source, self.sink = source, sink
        self.framing = Framing(route)
        self.queued_bytes = 0
        self.ended = self.blocked = self.abandoned = False  # no more input; the sink is full; the sink is gone

    def parcels(self, data: bytes, now_ns: int, prompt: int, quantum_bytes: int) -> Iterator[Parcel]:
        """A frame's last byte ends a parcel, so that it need not wait for the bytes behind it."""
        view, start = memoryview(data), 0
        step = quantum_bytes if self.link.bits_per_s < math.inf else READ_BYTES
        for size, frame, ends in self.framing.split(data, now_ns, prompt):
            for at in range(start, start + size, step):
                end = min(at + step, start + size)
                yield Parcel(view[at:end], frame, ends and end == start + size)
            start += size

    def due_ns(self) -> float:
        """When its next parcel is to be delivered; infinite if that cannot be said yet."""
        if self.held or self.blocked or not self.flying:
            return float("inf")
        return self.flying[0].due_ns


class Limits(NamedTuple):
    quantum_bytes: int  # what is transmitted in one turn at most
    room_bytes: int  # what a direction of a connection holds before it stops reading


class Connection:
    """Both sockets and both directions. Calls `on_close` once, whoever ends it."""

    def __init__(
        self,
        number: int,
        device: int,
        links: tuple[Link, Link],
        sockets: tuple[socket.socket, socket.socket],
        limits: Limits,
        selector: selectors.BaseSelector,
        record: LinkRecord,
        on_close: Callable[[Connection], None],
    ) -> None:
        """`links` are (down, up), `sockets` (to the node, to the base station), neither of which blocks."""
        near, far = sockets
        self.down = Stream(links[DOWN], far, near, Route(device, DOWN, number))
        self.up = Stream(links[UP], near, far, Route(device, UP, number))
        self.streams = (self.down, self.up)
        self._limits, self._selector, self._record, self._on_close = limits, selector, record, on_close
        self._closed = False
        self._watched: dict[socket.socket, int] = {}
        for reads, writes in ((self.up, self.down), (self.down, self.up)):
            reads.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._watch(reads, writes)

    def _watch(self, reads: Stream, writes: Stream) -> None:
        """Hear of one of the sockets exactly what can be acted upon."""
        wants_input = not (reads.ended or reads.abandoned) and reads.queued_bytes < self._limits.room_bytes
        events = wants_input * selectors.EVENT_READ | writes.blocked * selectors.EVENT_WRITE
        end = reads.source
        if events == self._watched.get(end, 0):
            return
        if end in self._watched:
            self._selector.unregister(end)
        if events:
            self._selector.register(end, events, partial(self._handle, reads, writes))
        self._watched.pop(end, None)
        if events:
            self._watched[end] = events

    def _handle(self, reads: Stream, writes: Stream, events: int) -> None:
        if events & selectors.EVENT_READ and not self._closed:
            self._read(reads)
        if events & selectors.EVENT_WRITE and not self._closed:
            writes.blocked = False
        if not self._closed:
            self._watch(reads, writes)

    def _read(self, stream: Stream) -> None:
        try:
            data = stream.source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # reset, or never connected
            data = b""
        now_ns = time.monotonic_ns()
        stream.queued_bytes += len(data)
        for parcel in stream.parcels(data, now_ns, self._record.prompt, self._limits.quantum_bytes):
            stream.offer(parcel, now_ns)
        if not data:
            stream.ended = True
            stream.offer(Parcel(memoryview(b""), None, False), now_ns)

    def deliver(self, stream: Stream, now_ns: int) -> None:
        """Hand on what is due, as far as the receiver takes it."""
        due = [parcel for parcel in islice(stream.flying, PIECES_AT_ONCE) if parcel.due_ns <= now_ns]
        out_ns = time.monotonic_ns()  # before: the receiver may run first
        try:
            sent = stream.sink.sendmsg([parcel.content for parcel in due])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._abandon(stream, now_ns)
            return
        stream.queued_bytes -= sent
        self._delivered(stream, due, sent, out_ns)
        if not self._closed:
            self._watch_both()

    def _delivered(self, stream: Stream, due: list[Parcel], sent: int, out_ns: int) -> None:
        for parcel in due:
            if sent < len(parcel.content):
                parcel.content = parcel.content[sent:]
                stream.blocked = True
                return
            sent -= len(parcel.content)
            stream.flying.popleft()
            if parcel.frame is not None:
                self._note(parcel.frame, parcel, out_ns)
            if not parcel.size_bytes:
                self.close()

    def _note(self, frame: Frame, parcel: Parcel, out_ns: int) -> None:
        if frame.air_begin_ns < 0:
            frame.air_begin_ns = parcel.begin_ns
        frame.air_ns += parcel.air_ns
        if parcel.ends_frame:
            self._record.add(frame, parcel.end_ns, parcel.due_ns, out_ns)

    def _watch_both(self) -> None:
        self._watch(self.up, self.down)
        self._watch(self.down, self.up)

    def _abandon(self, stream: Stream, now_ns: int) -> None:
        """The sink is gone. As a source it says so too, after what it still had to say: that ends the connection."""
        stream.clear(now_ns)
        stream.abandoned, stream.blocked, stream.queued_bytes = True, False, 0
        if self.down.abandoned and self.up.abandoned:
            self.close()
        else:
            self._watch_both()

    def close(self, reset: bool = False) -> None:
        """End both sides, with a TCP reset if asked. What is on its way is lost."""
        if self._closed:
            return
        self._closed = True
        now_ns = time.monotonic_ns()
        for stream in self.streams:
            stream.clear(now_ns)
            if stream.source in self._watched:
                self._selector.unregister(stream.source)
            if reset:
                stream.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            stream.source.close()
        self._on_close(self)
