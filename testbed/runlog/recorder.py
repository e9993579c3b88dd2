"""Writes a run's rows and events while the run goes on; sealed to Parquet when it ends.

N devices, T tokens of a round, K experts chosen per token, E experts per layer.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from testbed.errors import RunLogError
from testbed.runlog.columns import KEY_NAMES, columns_of, record_dtype
from testbed.runlog.events import append_event, hold
from testbed.runlog.keeper import Keeper
from testbed.runlog.schema import PARQUET, SCHEMA_VERSION, SEGMENT, TABLES
from testbed.runlog.seal import seal_segments
from testbed.runlog.segment_header import LOST
from testbed.runlog.table_writer import Columns, NoRoom, TableWriter

OWN_COLUMNS = {
    "rounds": {"device", "tokens", "record_ns_previous"},
    "tokens": {"token", *KEY_NAMES},
}


class Lost(NamedTuple):
    """What a full disk did not take."""

    rounds: int = 0
    rows: int = 0  # of both tables
    events: int = 0

    def __str__(self) -> str:
        return f"rounds lost: {self.rounds} ({self.rows} rows), events lost: {self.events}"


class Recorder:
    """One run's log, written by one thread into a directory that holds no log yet.

    A row is kept from the moment `record_round` returns, even if the process is killed then; a second later it survives
    a power cut too. Where the disk is full the run goes on: that is said at once, what finds no room is counted in
    `lost` and in the segments, rows written before stay readable, and `close` raises RunLogError in the end.
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
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`top_k` is K; `experts` is E, or 0 for a gate that gives no scores; `score_dtype` is float16 or float32.

        `say` is told at once, from whichever thread notices, that something is wrong; without it stderr is.
        """
        if score_dtype not in ("float16", "float32"):
            raise RunLogError(f"score_dtype {score_dtype!r}: scores are kept as float16 or float32")
        if segment_rows < 1:
            raise RunLogError(f"segment_rows {segment_rows}: a segment holds at least one row")
        if any(directory.glob(f"*{SEGMENT}")) or any(directory.glob(f"*{PARQUET}")):
            raise RunLogError(f"{directory}: holds a log already; record into a new run folder")
        self._directory = directory
        self._device_N = np.arange(len(device_names))
        self._record_ns = -1
        self.lost = Lost()
        self._say, self._said = say or _say_on_stderr, set[str]()
        self._flushing = threading.Lock()
        header = {"schema": SCHEMA_VERSION, "run_id": run_id, "devices": list(device_names)}
        header |= {"lost_bytes": LOST.itemsize}
        self._events: int | None = hold(directory)
        try:
            self._tables: dict[str, TableWriter] = {}
            for table in TABLES:
                columns = columns_of(table, experts, np.dtype(score_dtype).str)
                dtype = record_dtype(columns, top_k, experts)
                about = {**header, "table": table}
                self._tables[table] = TableWriter(directory, columns, dtype, OWN_COLUMNS[table], about, segment_rows)
        except BaseException:
            os.close(self._events)
            raise
        self._keeper = Keeper(self._keep)
        for writer in self._tables.values():
            writer.wake = self._keeper.wake

    def record_round(self, rounds: Columns, tokens: Columns) -> None:
        """One row per device and one per token; `round`, `policy`, `prompt`, `layer`, `phase` are scalars in `rounds`.

        rounds: every column of the schema but `device`, `tokens` and `record_ns_previous`, shape (N,) or scalar.
        tokens: `expert`, `weight`, `kept`, `device`, `final_weight` of shape (T, K), `score` (T, E), `orphaned` (T,).
        "first:last" stands for the columns from the one to the other, with an array (N, columns).
        A nullable column left out is null; so is NaN, -1 in a signed column and the largest value in an unsigned one.
        The tokens' rows are written first: a round that has its device rows has its tokens too.
        """
        start_ns = time.monotonic_ns()
        self._open_events()
        rounds_table, tokens_table = self._tables["rounds"], self._tables["tokens"]
        devices, count = len(self._device_N), len(tokens["expert"])
        try:
            rounds_table.prepare(devices, rounds)
            tokens_table.prepare(count, tokens)
        except NoRoom as error:
            self._lose_round(error, {"rounds": devices, "tokens": count})
            return
        keys = {name: rounds[name] for name in KEY_NAMES}
        tokens_table.write(count, tokens, {"token": np.arange(count), **keys})
        own = {"device": self._device_N, "tokens": count, "record_ns_previous": self._record_ns}
        rounds_table.write(devices, rounds, own)
        self._record_ns = time.monotonic_ns() - start_ns

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: JSON values and numpy scalars, NaN becomes null."""
        events = self._open_events()
        try:
            append_event(events, kind, **fields)
        except OSError as error:
            self.lost = self.lost._replace(events=self.lost.events + 1)
            self._say_once(f"{self._directory}: events find no room ({error.strerror}) and are lost; free disk space")

    def flush(self) -> None:
        """Wait until every row and event so far is on the disk. Nobody has to: it is done every half second."""
        events = self._open_events()
        with self._flushing:
            for table in self._tables.values():
                table.flush()
            os.fsync(events)

    def close(self) -> None:
        """Seal every segment into Parquet; a second call does nothing.

        Raises RunLogError where that cannot be done now, and `seal_run` may try again; and where rows or events
        were lost, after sealing the others.
        """
        if self._events is None:
            return
        self._keeper.stop()
        for table in self._tables.values():
            table.close()
        self._tables.clear()
        lost = self.lost
        incomplete = f"{self._directory}: not complete, since the disk was full: {lost}" if any(lost) else ""
        try:
            seal_segments(self._directory, self._events)
        except RunLogError as error:
            raise RunLogError(f"{incomplete}; {error}" if incomplete else str(error)) from error
        finally:
            if incomplete:
                self.event("rows_lost", **lost._asdict())
            os.close(self._events)
            self._events = None
        if incomplete:
            raise RunLogError(f"{incomplete}; all others are there; free disk space and run again")

    def _keep(self) -> None:
        """What the keeper does: have room ready for the rows to come, and bring those written to the disk."""
        try:
            for table in self._tables.values():
                table.look_ahead()
        except RunLogError as error:
            self._say_once(f"{error}; rows will be lost when the part being written is full")
        try:
            self.flush()
        except OSError as error:
            reason = error.strerror or error
            self._say_once(f"{self._directory}: cannot be brought to the disk ({reason}); a power cut may lose rows")

    def _lose_round(self, error: Exception, rows: Mapping[str, int]) -> None:
        for table, count in rows.items():
            self._tables[table].segment.count_lost(count)
        lost = self.lost
        self.lost = lost._replace(rounds=lost.rounds + 1, rows=lost.rows + sum(rows.values()))
        self._say_once(f"{error}; rows are lost from here on and counted")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _open_events(self) -> int:
        if self._events is None:
            raise RunLogError(f"{self._directory}: this log was closed; record into a new run folder")
        return self._events

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunLogError as problem:
            if kind is None:
                raise
            self._say(str(problem))  # what ended the run is told by the error under way


def _say_on_stderr(text: str) -> None:
    with suppress(OSError):  # whoever read it may be gone
        print(f"warning: {text}", file=sys.stderr, flush=True)
