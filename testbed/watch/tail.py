"""Reads what a run adds to its log, and what follows from it so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pyarrow as pa

from testbed.errors import RunLogError
from testbed.runlog.catalog import State, describe_run, is_recorded
from testbed.runlog.reader import read_manifest, read_parquet, to_table
from testbed.runlog.schema import EVENTS, PARQUET, SEGMENT
from testbed.runlog.segment import read_segment
from testbed.watch.figures import Figures
from testbed.watch.tally import OF_ROUNDS, OF_TOKENS, Tally


def watch(run_dir: Path, every_s: float, *, once: bool, wait: Callable[[float], None] = sleep) -> Iterator[Figures]:
    """What the run's log says now, and again every so many seconds until it is no longer recorded; `once`: only now.

    Raises RunLogError where the log is damaged.
    """
    manifest = read_manifest(run_dir)
    tally, events = Tally(run_dir.name, manifest), EventTail(run_dir)
    rounds = TableTail(run_dir, "rounds", OF_ROUNDS, together=len(manifest["devices"]))
    tokens = TableTail(run_dir, "tokens", OF_TOKENS)
    while True:
        lives = is_recorded(run_dir)  # asked before reading: what was written until its end is read once more
        tally.add_events(events.new())
        for rows in rounds.new():
            tally.add_rounds(rows)
        for rows in tokens.new():
            tally.add_tokens(rows)
        yield tally.figures((State.RUNNING if lives else describe_run(run_dir).state).value)
        if once or not lives:
            return
        wait(every_s)


class TableTail:
    """Rows of `rounds` or `tokens` since the last call. Parts are read in order; sealing one changes no row."""

    def __init__(self, run_dir: Path, table: str, columns: Sequence[str], together: int = 1) -> None:
        """`together` rows are written at once: of the last such group some may still be to come."""
        self._stem, self._columns, self._together = run_dir / table, columns, together
        self._part, self._read = 0, 0

    def new(self) -> Iterator[pa.Table]:
        """A table for each part that has new rows, with those of the columns that this run has."""
        while self._file(self._part) is not None:
            following = self._file(self._part + 1)  # looked for first: once it is there, nothing is added to this part
            rows = self._rows()
            rows = rows.slice(0, len(rows) // self._together * self._together)
            self._read += len(rows)
            if len(rows):
                yield rows
            if following is None:
                return
            self._part, self._read = self._part + 1, 0

    def _rows(self) -> pa.Table:
        path = self._file(self._part)
        if path is not None and path.suffix == SEGMENT:
            try:
                header, records, *_ = read_segment(path)
                names = [name for name in self._columns if name in (records.dtype.names or ())]
                return to_table(header, records[self._read :][names])
            except FileNotFoundError:  # sealed in this moment
                pass
        table = read_parquet(self._path(self._part, PARQUET))
        return table.select([name for name in self._columns if name in table.column_names]).slice(self._read)

    def _file(self, part: int) -> Path | None:
        return next((path for end in (SEGMENT, PARQUET) if (path := self._path(part, end)).exists()), None)

    def _path(self, part: int, end: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{part:04d}{end}")


class EventTail:
    """Events since the last call, without a last line that is not finished yet."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._read = run_dir / EVENTS, 0

    def new(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole) + len(newline)
            return [json.loads(line) for line in whole.split(b"\n") if line]
        except OSError as error:
            raise RunLogError(f"{self._path}: cannot be read ({error.strerror}); name the folder of a run") from error
        except ValueError as error:
            raise RunLogError(f"{self._path}: a line is not valid JSON ({error}); restore it from a copy") from error
