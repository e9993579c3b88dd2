"""The rows that a node writes itself, one per block: written in a microsecond, whole after kill -9, read back checked.

A file is a segment (`segment.py`) of the columns NODE_RECORD; its header names the device and the node's process.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from testbed.errors import RunLogError
from testbed.runlog.columns import NODE_RECORD, record_dtype
from testbed.runlog.schema import NODES, SCHEMA_VERSION, Reply
from testbed.runlog.segment import Records, Segment, read_segment
from testbed.runlog.segment_header import LOST, PREAMBLE, describe_record

DTYPE = record_dtype(NODE_RECORD, top_k=1, experts=0)
FIELDS: Mapping[str, Any] = DTYPE.fields or {}
RECORD = describe_record(DTYPE)
MAX_ROWS = 2**18
MAX_FILE_BYTES = 2**16 + MAX_ROWS * DTYPE.itemsize  # what is larger was written by something else
UNKNOWN_NS = -1

Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class NodeHeader(msgspec.Struct, frozen=True):
    """What a file says of its rows; more may stand in it."""

    schema: Annotated[int, Meta(ge=1, le=SCHEMA_VERSION)]
    table: Literal["nodes"]
    device: Annotated[str, Meta(min_length=1, max_length=512)]
    boot_id: Natural  # of the node's process, as it told the base station
    segment: Natural
    monotonic_ns: Natural
    realtime_ns: Natural
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]  # for which there is room
    lost_bytes: Annotated[int, Meta(ge=LOST.itemsize, le=LOST.itemsize)]  # behind them, a count of rows without room


class NodeRows(NamedTuple):
    """The rows of one file, in the order they were written."""

    path: Path
    header: NodeHeader
    records: Records
    missing: int  # rows that were written after them, from the first on that a power cut took
    not_kept: int  # rows that came while this file was the newest and the disk had no room for another


def _struct() -> struct.Struct:
    """The record, padded as numpy aligns it; its commit mark comes last."""
    codes, at = "<", 0
    for field, offset, *_ in FIELDS.values():
        codes += "x" * (offset - at)
        at = offset + field.itemsize
        code = {1: "b", 2: "h", 4: "i", 8: "q"}[field.itemsize]
        codes += code.upper() if field.kind == "u" else code
    return struct.Struct(codes)


_RECORD, _BYTE = _struct(), struct.Struct("<B")
_REPLY_AT = FIELDS["reply"][1]


class NodeSegment:
    """One file of a node's rows, open for appending: a packed write into shared memory, the row's mark at its end."""

    def __init__(self, path: Path, device: str, boot_id: int, segment: int, capacity: int) -> None:
        """Reserve room for `capacity` rows. Raises RunLogError where the disk has none."""
        self.path, self.capacity, self.used, self._flushed = path, capacity, 0, 0
        stamps = {"monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()}
        about = {"schema": SCHEMA_VERSION, "table": NODES, "device": device, "boot_id": boot_id, "segment": segment}
        self._segment = Segment(path, {**about, **stamps, "lost_bytes": LOST.itemsize}, DTYPE, capacity, checked=False)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # until this process ends: nobody removes the file
        self._map = mmap.mmap(self._file, 0)
        self._last = self._next = PREAMBLE.unpack_from(self._map)[2]  # the first byte after the header

    def append(self, *values: int) -> None:
        """One row: a value for every column of NODE_RECORD, each within its type. There must be room."""
        at, self.used = self._next, self.used + 1
        _RECORD.pack_into(self._map, at, *values, self.used)  # field after field: with its mark, the last, a row exists
        self._last, self._next = at, at + DTYPE.itemsize

    def sent(self) -> None:
        """The reply of the last row's block was handed to the socket whole."""
        _BYTE.pack_into(self._map, self._last + _REPLY_AT, Reply.SENT)

    def count_lost(self, rows: int) -> None:
        """So many rows came for which there was no room. Takes none itself."""
        self._segment.count_lost(rows)

    def flush(self) -> None:
        """Bring what was written since the last call to the disk. Blocks for as long as the disk needs."""
        if self.used > self._flushed:
            os.fdatasync(self._file)
            self._flushed = self.used

    def close(self) -> None:
        """Nothing more is written. A file without rows goes away."""
        self._map.close()
        os.close(self._file)
        if not self.used:
            self.path.unlink(missing_ok=True)


def is_written(path: Path) -> bool:
    """Whether a node that lives writes to it: the kernel frees a lock whose process ended."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_node_rows(path: Path) -> NodeRows:
    """The rows of a file, live or left behind. Raises RunLogError, in one line, for any other file.

    Nothing in the file is believed before it was checked: not its size, its header, nor the layout of its records.
    """
    try:
        header = _checked_header(path)
        about, records, missing, _ = read_segment(path)
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    known = np.isin(records["reply"], [reply.value for reply in Reply])
    if not known.all():
        raise RunLogError(f"{path}: row {int(known.argmin())} is damaged; restore the file from a copy")
    return NodeRows(path, header, records, missing, about["lost_rows"])


def _checked_header(path: Path) -> NodeHeader:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise RunLogError(f"{path}: {size} bytes are more than a node writes into a file; it is none of its rows")
    with path.open("rb") as file:
        preamble = file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size:
            raise RunLogError(f"{path}: too short for rows of a node; it was truncated, restore it from a copy")
        _, _, head_bytes, _ = PREAMBLE.unpack(preamble)
        body = file.read(max(0, min(head_bytes, size, 2**16) - PREAMBLE.size))
    try:
        found = json.loads(body)
        header = msgspec.convert(found, NodeHeader)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise RunLogError(f"{path}: not a file of a node's rows ({error}); name a folder of such files") from error
    if found.get("record") != RECORD:
        raise RunLogError(f"{path}: its rows have other columns than this program's; use the one that wrote it")
    return header
