"""Appends rows to the segments of one table, the next of which is reserved before it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from testbed.errors import RunLogError
from testbed.runlog.columns import SPAN, Column, span
from testbed.runlog.schema import SEGMENT
from testbed.runlog.segment import Segment
from testbed.runlog.segment_header import Header

Columns = Mapping[str, Any]  # by column name: an array with one entry per row, or a scalar for all rows

RETRY_NS = 1_000_000_000  # after no room was found for a segment


class NoRoom(Exception):
    """A round fits into no segment, and the disk has no room for another one."""


class TableWriter:
    """Appends rows to one table, rolling over to a new segment where a round no longer fits into the old one.

    Once half of a segment is written, the keeper's thread reserves the next one, under its temporary name.
    """

    def __init__(
        self,
        directory: Path,
        columns: Sequence[Column],
        dtype: np.dtype[Any],
        own: set[str],
        header: Header,
        segment_rows: int,
    ) -> None:
        """`own` are the columns that the recorder fills by itself; `header` that of every segment, with the table."""
        self._directory, self._dtype, self._segment_rows = directory, dtype, segment_rows
        self._table, self._header = header["table"], header
        self._missing = {column.name: column.missing for column in columns if column.nullable}
        self._names = {column.name for column in columns} - own
        self._given: set[str] = set()  # the columns of the last call, and what to write into those left out
        self._left_out: dict[str, Any] = {}
        self._number = 0
        self._making = threading.Lock()  # whoever needs the next segment waits for the other to have made it
        self._next: Segment | None = None
        self._next_wanted, self._tried_ns, self._why = False, -RETRY_NS, ""
        self.wake: Callable[[], None] = lambda: None
        self._unflushed: list[Segment] = []
        self._roll_over(segment_rows)

    def prepare(self, count: int, columns: Columns) -> None:
        """Check the columns' names and make room for `count` rows; nothing is written if either fails."""
        if columns.keys() != self._given:
            self._check(set(columns))
        if self.segment.used + count > self._calm_until:
            self._find_room(count)

    def write(self, count: int, columns: Columns, own: Columns) -> None:
        segment = self.segment
        rows, views = slice(segment.used, segment.used + count), segment.columns
        for name, value in columns.items():
            views[name][rows] = value
        for name, value in own.items():
            views[name][rows] = value
        for name, value in self._left_out.items():
            views[name][rows] = value
        segment.commit(count)

    @property
    def room(self) -> int:
        """Rows that still fit without another segment."""
        return self.segment.capacity - self.segment.used

    def look_ahead(self) -> None:
        """Reserve the next segment if it is wanted by now; raises RunLogError if the disk is too full."""
        with self._making:
            if self._next_wanted and self._next is None:
                self._next = self._new_segment(self._segment_rows)

    def flush(self) -> None:
        while True:
            segment = self._unflushed[0]
            segment.flush()
            if segment is self._unflushed[-1]:
                return
            del self._unflushed[0]
            segment.close()

    def close(self) -> None:
        """Nothing more is written. The keeper must have stopped."""
        for segment in (*self._unflushed, self._next):
            if segment is not None:
                segment.close()
        self._unflushed.clear()

    def _find_room(self, count: int) -> None:
        """For `count` rows, now, or have it found for those to come. Raises NoRoom."""
        if self.room >= count:
            self._calm_until, self._next_wanted = self.segment.capacity, True
            self.wake()
        elif time.monotonic_ns() - self._tried_ns < RETRY_NS:
            raise NoRoom(self._why)
        else:
            try:
                self._roll_over(count)
            except RunLogError as error:
                self._tried_ns, self._why = time.monotonic_ns(), str(error)
                raise NoRoom(self._why) from error

    def _roll_over(self, count: int) -> None:
        with self._making:
            segment, self._next = self._next, None
            if segment is None or segment.capacity < count:
                segment = self._new_segment(max(count, self._segment_rows))
            self._next_wanted = False
            segment.publish()
            self._number += 1
        self._unflushed.append(segment)
        self.segment, self._calm_until = segment, segment.capacity // 2

    def _check(self, names: set[str]) -> None:
        order = self._dtype.names or ()
        given = {each for name in names for each in (span(name, order) if SPAN in name else (name,))}
        unknown, absent = given - self._names, self._names - given - self._missing.keys()
        if unknown or absent:
            what = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(absent)}"
            raise RunLogError(f"table {self._table}: {what}; the columns are listed in testbed/runlog/columns.py")
        self._given = names
        self._left_out = {name: self._missing[name] for name in self._names - given}

    def _new_segment(self, rows: int) -> Segment:
        path = self._directory / f"{self._table}-{self._number:04d}{SEGMENT}"
        stamps = {"boot_id": _boot_id(), "monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()}
        about = {**self._header, "segment": self._number, **stamps}
        return Segment(path, about, self._dtype, rows, publish=False)


def _boot_id() -> str | None:
    """Identifies this boot of the kernel: monotonic stamps of two boots cannot be compared."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None
