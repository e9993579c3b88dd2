"""The true times of every frame that crossed an emulated link, as the relay saw them.

The relay follows ZMTP 3 (rfc.zeromq.org/spec/23): a greeting of 64 bytes, then frames, each an octet of flags, its size
in one or eight bytes, and its body. Under CURVE a frame's body is encrypted and its size is not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testbed.runlog.reader import read_parquet
from testbed.runlog.segment import new_file

DOWN, UP = 0, 1
GREETING_BYTES, GREETING = 64, 0xFF
LONG = 0x02
ALL_FLAGS = 0x07
SHORT_HEAD_BYTES, LONG_HEAD_BYTES = 2, 9
BLOCK_ROWS = 4096

# Times are CLOCK_MONOTONIC. `prompt` is the one in force when the frame's first byte came, -1 before the first. `flags`
# is its first octet: 255 the greeting, 4 a command, 1 more frames follow. `bytes` counts its head too. Between
# `air_begin_ns` and `air_end_ns` others may have had their turn: `air_ns` is what the frame alone took. Its last byte
# was to be handed on at `due_ns` and was at `out_ns`.
COLUMNS = np.dtype(
    [
        ("device", "<u2"),
        ("direction", "u1"),
        ("prompt", "<i4"),
        ("connection", "<u4"),
        ("flags", "u1"),
        ("bytes", "<u8"),
        ("first_in_ns", "<i8"),
        ("last_in_ns", "<i8"),
        ("air_begin_ns", "<i8"),
        ("air_end_ns", "<i8"),
        ("due_ns", "<i8"),
        ("out_ns", "<i8"),
        ("air_ns", "<f8"),
    ]
)


class Route(NamedTuple):
    """One direction of a connection. The number of a connection is its own."""

    device: int
    direction: int
    connection: int


class Frame:
    """A frame on its way."""

    __slots__ = ("air_begin_ns", "air_ns", "first_in_ns", "flags", "last_in_ns", "prompt", "route", "size_bytes")

    def __init__(self, route: Route, first_in_ns: int, prompt: int, flags: int) -> None:
        self.route, self.prompt, self.flags = route, prompt, flags
        self.first_in_ns = self.last_in_ns = first_in_ns
        self.size_bytes = 0
        self.air_begin_ns = -1.0
        self.air_ns = 0.0


class Framing:
    """Where the frames of one direction of a connection begin and end. Gives up, `lost`, on what is not ZMTP 3."""

    def __init__(self, route: Route) -> None:
        self.lost = False
        self._route = route
        self._frame: Frame | None = None
        self._head = bytearray()
        self._total_bytes: int | None = GREETING_BYTES  # of the current frame, once known
        self._greeting = True

    def split(self, data: bytes, now_ns: int, prompt: int) -> list[tuple[int, Frame | None, bool]]:
        """The stretches of what was read just now: bytes, their frame (None: not known), whether it ends there."""
        stretches: list[tuple[int, Frame | None, bool]] = []
        at = 0
        while at < len(data):
            frame = self._frame or self._begin(data[at], now_ns, prompt)
            if frame is None:
                stretches.append((len(data) - at, None, False))
                break
            size = self._size_within(frame, data, at)
            frame.size_bytes += size
            frame.last_in_ns = now_ns
            ends = frame.size_bytes == self._total_bytes
            stretches.append((size, frame, ends))
            at += size
            if ends:
                self._frame, self._total_bytes = None, None
        return stretches

    def _begin(self, first_octet: int, now_ns: int, prompt: int) -> Frame | None:
        if self.lost or (first_octet != GREETING if self._greeting else first_octet > ALL_FLAGS):
            self.lost = True
            return None
        self._greeting = False
        self._head.clear()
        self._frame = Frame(self._route, now_ns, prompt, first_octet)
        return self._frame

    def _size_within(self, frame: Frame, data: bytes, at: int) -> int:
        """How many bytes of the data from here on belong to the frame."""
        there = len(data) - at
        if self._total_bytes is None:
            head_bytes = LONG_HEAD_BYTES if frame.flags & LONG else SHORT_HEAD_BYTES
            self._head += data[at : at + head_bytes - len(self._head)]
            if len(self._head) < head_bytes:
                return there
            self._total_bytes = head_bytes + int.from_bytes(self._head[1:], "big")
        return min(there, self._total_bytes - frame.size_bytes)


class LinkRecord:
    """Rows in memory, one a frame, in order of delivery. They grow by blocks: copying them would hold up the links."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.prompt = -1
        self.frames = 0
        self._devices = list(devices)
        self._blocks = [np.empty(BLOCK_ROWS, COLUMNS)]

    def add(self, frame: Frame, air_end_ns: float, due_ns: float, out_ns: int) -> None:
        """A frame has been delivered whole."""
        row = self.frames % BLOCK_ROWS
        if not row and self.frames:
            self._blocks.append(np.empty(BLOCK_ROWS, COLUMNS))
        self._blocks[-1][row] = (
            frame.route.device,
            frame.route.direction,
            frame.prompt,
            frame.route.connection,
            frame.flags,
            frame.size_bytes,
            frame.first_in_ns,
            frame.last_in_ns,
            round(frame.air_begin_ns),
            round(air_end_ns),
            round(due_ns),
            out_ns,
            frame.air_ns,
        )
        self.frames += 1

    def write(self, path: Path) -> None:
        """As Parquet: whole or not at all. Raises RunLogError if it cannot be written."""
        rows = np.concatenate(self._blocks)[: self.frames]
        columns = {name: np.ascontiguousarray(rows[name]) for name in COLUMNS.names or ()}
        table = pa.table(columns).replace_schema_metadata({"devices": json.dumps(self._devices)})
        with new_file(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_record(path: Path) -> pa.Table:
    """One row a frame, columns as in COLUMNS; `device` is an index into the names in the schema's metadata, `devices`.

    Raises RunLogError if it cannot be read.
    """
    return read_parquet(path)
