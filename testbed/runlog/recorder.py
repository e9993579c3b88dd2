"""Writes a run's rows and events while the run goes on; sealed to Parquet when it ends.

N devices, T tokens of a round, K experts chosen per token, E experts per layer.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from testbed.errors import RunLogError
from testbed.runlog import schema
from testbed.runlog.schema import PARQUET, SEGMENT
from testbed.runlog.seal import hold, seal_segments
from testbed.runlog.segment import Header, Segment

Columns = Mapping[str, Any]  # by column name: an array with one entry per row, or a scalar for all rows

OWN_COLUMNS = {
    "rounds": {"device", "tokens", "record_ns_previous"},
    "tokens": {"token", *schema.KEY_NAMES},
}


class Recorder:
    """One run's log, written by one thread into a directory that holds no log yet.

    A row is kept from the moment `record_round` returns, even if the process is killed then; `flush`, called about once
    a second by the owner, makes it survive a power cut. A full disk is a RunLogError; rows written stay readable.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        device_names: Sequence[str],
        *,
        top_k: int,
        experts: int,
        score_dtype: str = "float16",
        segment_rows: int = 65_536,
    ) -> None:
        """`top_k` is K; `experts` is E, or 0 for a gate that gives no scores; `score_dtype` is float16 or float32."""
        if score_dtype not in ("float16", "float32"):
            raise RunLogError(f"score_dtype {score_dtype!r}: scores are kept as float16 or float32")
        if segment_rows < 1:
            raise RunLogError(f"segment_rows {segment_rows}: a segment holds at least one row")
        if any(directory.glob(f"*{SEGMENT}")) or any(directory.glob(f"*{PARQUET}")):
            raise RunLogError(f"{directory}: holds a log already; record into a new run folder")
        self._directory = directory
        self._device_N = np.arange(len(device_names))
        self._record_ns = -1
        header = {"schema": schema.SCHEMA_VERSION, "run_id": run_id, "devices": list(device_names)}
        self._events: int | None = hold(directory)
        try:
            self._tables = {}
            for table in schema.TABLES:
                columns = schema.columns_of(table, experts, np.dtype(score_dtype).str)
                dtype = schema.record_dtype(columns, top_k, experts)
                self._tables[table] = _TableWriter(directory, columns, dtype, {**header, "table": table}, segment_rows)
        except BaseException:
            os.close(self._events)
            raise

    def record_round(self, rounds: Columns, tokens: Columns) -> None:
        """One row per device and one per token; `round`, `policy`, `prompt`, `layer`, `phase` are scalars in `rounds`.

        rounds: every column of the schema but `device`, `tokens` and `record_ns_previous`, shape (N,) or scalar.
        tokens: `expert`, `weight`, `kept`, `device`, `final_weight` of shape (T, K), `score` (T, E), `orphaned` (T,).
        A nullable column left out is null; so is NaN, -1 in a signed column and the largest value in an unsigned one.
        The tokens' rows are written first: a round that has its device rows has its tokens too.
        """
        start_ns = time.monotonic_ns()
        self._open_events()
        rounds_table, tokens_table = self._tables["rounds"], self._tables["tokens"]
        devices, count = len(self._device_N), len(tokens["expert"])
        rounds_table.prepare(devices, rounds)
        tokens_table.prepare(count, tokens)
        keys = {name: rounds[name] for name in schema.KEY_NAMES}
        tokens_table.write(count, tokens, {"token": np.arange(count), **keys})
        own = {"device": self._device_N, "tokens": count, "record_ns_previous": self._record_ns}
        rounds_table.write(devices, rounds, own)
        self._record_ns = time.monotonic_ns() - start_ns

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: JSON values and numpy scalars, NaN becomes null."""
        events = self._open_events()
        stamps = {"realtime_ns": time.time_ns(), "monotonic_ns": time.monotonic_ns()}
        known = {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()
        }
        line = json.dumps({**stamps, "kind": kind, **known}, default=_python_scalar, allow_nan=False).encode() + b"\n"
        _append_line(events, line, self._directory)

    def flush(self) -> None:
        """Wait until every row and event so far is on the disk."""
        events = self._open_events()
        for table in self._tables.values():
            table.flush()
        os.fsync(events)

    def close(self) -> None:
        """Seal every segment into Parquet; a second call does nothing. After a RunLogError `seal_run` may try again."""
        if self._events is None:
            return
        try:
            seal_segments(self._directory)
        finally:
            os.close(self._events)
            self._events = None
            self._tables.clear()

    def _open_events(self) -> int:
        if self._events is None:
            raise RunLogError(f"{self._directory}: this log was closed; record into a new run folder")
        return self._events

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TableWriter:
    """Appends rows to one table, rolling over to a new segment where a round no longer fits into the old one."""

    def __init__(
        self,
        directory: Path,
        columns: Sequence[schema.Column],
        dtype: np.dtype[Any],
        header: Header,
        segment_rows: int,
    ) -> None:
        self._directory, self._dtype, self._segment_rows = directory, dtype, segment_rows
        self._table, self._header = header["table"], header
        self._missing = {column.name: column.missing for column in columns if column.nullable}
        self._names = {column.name for column in columns} - OWN_COLUMNS[header["table"]]
        self._given: set[str] = set()  # the columns of the last call, and what to write into those left out
        self._left_out: dict[str, Any] = {}
        self._number = 0
        self._unflushed = [self._new_segment(segment_rows)]

    def prepare(self, count: int, columns: Columns) -> None:
        """Check the columns' names and make room for `count` rows; nothing is written if either fails."""
        if columns.keys() != self._given:
            self._check(set(columns))
        segment = self._unflushed[-1]
        if segment.used + count > segment.capacity:
            self._unflushed.append(self._new_segment(max(count, self._segment_rows)))

    def write(self, count: int, columns: Columns, own: Columns) -> None:
        segment = self._unflushed[-1]
        rows, views = slice(segment.used, segment.used + count), segment.columns
        for name, value in columns.items():
            views[name][rows] = value
        for name, value in own.items():
            views[name][rows] = value
        for name, value in self._left_out.items():
            views[name][rows] = value
        segment.commit(count)

    def flush(self) -> None:
        for segment in self._unflushed:
            segment.flush()
        del self._unflushed[:-1]

    def _check(self, given: set[str]) -> None:
        unknown, absent = given - self._names, self._names - given - self._missing.keys()
        if unknown or absent:
            what = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(absent)}"
            raise RunLogError(f"table {self._table}: {what}; the columns are listed in testbed/runlog/schema.py")
        self._given = given
        self._left_out = {name: self._missing[name] for name in self._names - given}

    def _new_segment(self, rows: int) -> Segment:
        path = self._directory / f"{self._table}-{self._number:04d}{SEGMENT}"
        stamps = {"boot_id": _boot_id(), "monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()}
        about = {**self._header, "segment": self._number, **stamps}
        segment = Segment(path, about, self._dtype, rows)
        self._number += 1
        return segment


def _append_line(file: int, line: bytes, directory: Path) -> None:
    """A full disk takes the first bytes of a line and only then refuses: such a stump is cut off again."""
    size = os.fstat(file).st_size
    try:
        if os.write(file, line) == len(line):
            return
        reason = "no room for the whole line"
    except OSError as error:
        reason = str(error.strerror)
    os.ftruncate(file, size)
    raise RunLogError(f"{directory}: event not written ({reason}); free disk space")


def _python_scalar(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an event cannot hold {type(value).__name__}")


def _boot_id() -> str | None:
    """Identifies this boot of the kernel: monotonic stamps of two boots cannot be compared."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None
