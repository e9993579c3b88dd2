"""Turns finished segments into Parquet; may be interrupted at any point and repeated."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq

from testbed.errors import RunLogError
from testbed.runlog.reader import read_parquet, to_table
from testbed.runlog.schema import EVENTS, PARQUET, SEGMENT, TABLES
from testbed.runlog.segment import TEMPORARY, new_file, read_segment
from testbed.runlog.summary import write_summary


def seal_run(run_dir: Path) -> list[Path]:
    """Seal what a killed run left behind; returns the new files. Raises RunLogError while the run is still recorded."""
    lock = hold(run_dir)
    try:
        return seal_segments(run_dir)
    finally:
        os.close(lock)


def seal_segments(run_dir: Path) -> list[Path]:
    """Seal every segment; the caller holds the run."""
    for table in TABLES:
        for unfinished in run_dir.glob(f"{table}-*{TEMPORARY}"):  # hold no row that is not elsewhere
            unfinished.unlink()
    sealed = [seal_segment(path) for path in sorted(run_dir.glob(f"*{SEGMENT}"))]
    if sealed:
        # The rows are safe, whatever stands in them; a summary can be made again when it is asked for.
        with suppress(RunLogError, ArithmeticError, ValueError):
            write_summary(run_dir)
    return sealed


def seal_segment(path: Path) -> Path:
    """Write the rows to Parquet, read them back, and only then delete the segment; raises RunLogError and keeps it.

    Parquet needs room too. Where the disk has none the rows stay where they are, and sealing the run again ends it.
    """
    header, records, missing = read_segment(path)
    if missing:
        first = len(records)
        raise RunLogError(
            f"{path}: rows {first} to {first + missing - 1} never reached the disk; left as it is, readable up to there"
        )
    sealed = path.with_suffix(PARQUET)
    try:
        with new_file(sealed) as temporary:
            pq.write_table(to_table(header, records), temporary, compression="zstd", write_page_checksum=True)
    except RunLogError as error:
        kept = f"no row in {path.name} is lost, `testbed logs recover {path.parent}` ends this later"
        raise RunLogError(f"{error}; {kept}") from error
    rows = read_parquet(sealed).num_rows
    if rows != len(records):
        raise RunLogError(f"{sealed}: {rows} rows read back of {len(records)}; the segment is kept, seal the run again")
    path.unlink()
    return sealed


def hold(run_dir: Path) -> int:
    """Open the run's events for appending and lock them: a run has one recorder or one sealer. The kernel frees a lock
    whose process was killed."""
    try:
        file = os.open(run_dir / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise RunLogError(
            f"{run_dir / EVENTS}: cannot be written ({error.strerror}); choose another logs folder"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise RunLogError(f"{run_dir}: this run is still being recorded; stop it first") from error
    return file
