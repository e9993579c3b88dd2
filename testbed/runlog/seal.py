"""Turns finished segments into Parquet; may be interrupted at any point and repeated."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from testbed.errors import RunLogError
from testbed.runlog.events import append_event, cut_what_was_torn, hold
from testbed.runlog.reader import read_parquet, to_table
from testbed.runlog.schema import DAMAGED, EVENTS, PARQUET, SEGMENT, TABLES
from testbed.runlog.segment import TEMPORARY, new_file, read_segment
from testbed.runlog.summary import write_summary

ROWS_MISSING = "rows_missing"


class Sealed(NamedTuple):
    """What became of a segment."""

    path: Path
    table: str
    rows: int
    missing: int  # rows that a power cut or a damaged disk took
    damaged: Path | None  # the segment, kept because something of them is in it


def seal_run(run_dir: Path) -> list[Sealed]:
    """Seal what a killed run left behind. Raises RunLogError while the run is still recorded, or as `seal_segments`."""
    lock = hold(run_dir)
    try:
        cut_what_was_torn(lock)
        return seal_segments(run_dir, lock)
    except OSError as error:
        raise RunLogError(f"{run_dir / EVENTS}: cannot be written ({error.strerror}); free disk space") from error
    finally:
        os.close(lock)


def seal_segments(run_dir: Path, events: int) -> list[Sealed]:
    """Seal every segment; `events` is the file that holds the run. Raises RunLogError if one cannot be sealed, after
    all others were."""
    for table in TABLES:
        for unfinished in run_dir.glob(f"{table}-*{TEMPORARY}"):  # hold no row that is not elsewhere
            unfinished.unlink()
    outcomes = [_sealed_or_why_not(path, events) for path in sorted(run_dir.glob(f"*{SEGMENT}"))]
    sealed = [outcome for outcome in outcomes if isinstance(outcome, Sealed)]
    for problem in outcomes:
        if isinstance(problem, str):
            raise RunLogError(problem)
    if sealed:
        # The rows are safe, whatever stands in them; a summary can be made again when it is asked for.
        with suppress(RunLogError, ArithmeticError, ValueError):
            write_summary(run_dir)
    return sealed


def _sealed_or_why_not(path: Path, events: int) -> Sealed | str:
    """Not the error itself: it would hold the segment's memory, and so its room on the disk."""
    try:
        return seal_segment(path, events)
    except RunLogError as error:
        return str(error)


def seal_segment(path: Path, events: int) -> Sealed:
    """Write the rows to Parquet, read them back, and only then let go of the segment; raises RunLogError and keeps it.

    Rows that are not whole any more are counted, in Parquet's metadata and in an event. Parquet needs room too: where
    the disk has none the rows stay where they are, and sealing the run again ends it.
    """
    header, records, missing, remains = read_segment(path)
    sealed = path.with_suffix(PARQUET)
    try:
        with new_file(sealed) as temporary:
            pq.write_table(to_table(header, records), temporary, compression="zstd", write_page_checksum=True)
        if missing:
            _tell_once(path.parent, events, path.stem, missing)
    except (RunLogError, OSError) as error:
        kept = f"no row in {path.name} is lost, `testbed logs recover {path.parent}` ends this later"
        raise RunLogError(f"{error}; {kept}") from error
    rows = read_parquet(sealed).num_rows
    if rows != len(records):
        raise RunLogError(f"{sealed}: {rows} rows read back of {len(records)}; the segment is kept, seal the run again")
    damaged = path.with_suffix(DAMAGED) if remains else None
    if damaged is None:
        path.unlink()
    else:
        path.rename(damaged)
    return Sealed(sealed, path.stem.rpartition("-")[0], rows, missing, damaged)


def _tell_once(run_dir: Path, events: int, part: str, rows: int) -> None:
    """On the disk before the segment goes; not again where a sealer was killed in between."""
    if f'"kind": "{ROWS_MISSING}", "part": "{part}"'.encode() not in (run_dir / EVENTS).read_bytes():
        append_event(events, ROWS_MISSING, part=part, rows=rows)
    os.fsync(events)
