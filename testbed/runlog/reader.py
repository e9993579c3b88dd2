"""Reads a run's log, sealed or live, whole or left behind by a killed process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.runlog.schema import COMMIT, EVENTS, MANIFEST, PARQUET, SEGMENT, TABLES, missing_value, nullable_names
from testbed.runlog.segment import Header, Records, read_segment, refuse_newer

ABOUT = b"wdmoe"  # the key of a segment's header in Parquet's metadata


def read_table(run_dir: Path, table: str) -> pa.Table:
    """All committed rows of `rounds` or `tokens`, in the order they were recorded; unknown values are null.

    Raises RunLogError if the run has no such rows, or if a file is missing, truncated, damaged or no part of a log.
    """
    return pa.concat_tables([_read_part(run_dir / name) for name in _parts(run_dir, table)])


def _parts(run_dir: Path, table: str) -> list[str]:
    """The parts of a table, in order, without the ending of their files."""
    if table not in TABLES:
        raise RunLogError(f"no table {table!r} in a run log; there are {' and '.join(TABLES)}")
    files = [*run_dir.glob(f"{table}-*{SEGMENT}"), *run_dir.glob(f"{table}-*{PARQUET}")]
    names = sorted({path.stem for path in files}, key=lambda name: (len(name), name))
    if not names:
        raise RunLogError(f"{run_dir}: no {table} in this folder; name the folder of a run")
    absent = {f"{table}-{number:04d}" for number in range(len(names))} - set(names)
    if absent:
        raise RunLogError(f"{run_dir / min(absent)}: this part of the log is missing; restore it from a copy")
    return names


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The run's manifest; raises RunLogError if there is none, it is no JSON object, or of a newer program."""
    path = run_dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from error
    except ValueError as error:
        raise RunLogError(f"{path}: not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(manifest, dict):
        raise RunLogError(f"{path}: a manifest is a JSON object; restore it from a copy")
    refuse_newer(manifest, path)
    return manifest


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The run's rare events, oldest first, without a last line that was never finished."""
    path = run_dir / EVENTS
    try:
        *lines, _ = path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from error
    except ValueError as error:
        raise RunLogError(f"{path}: a line is not valid JSON ({error}); restore it from a copy") from error


def read_parquet(path: Path) -> pa.Table:
    """One sealed file, its page checksums verified."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            refuse_newer(_about(file.schema_arrow, path), path)
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise RunLogError(
            f"{path}: not a readable Parquet file ({_first_line(error)}); restore it from a copy"
        ) from error


def lost_rows(run_dir: Path, table: str) -> int | None:
    """Rows that a full disk did not take; None where one of the files is of a program that did not count them.

    Raises RunLogError as `read_table` does.
    """
    lost = [_header_of(run_dir / name).get("lost_rows") for name in _parts(run_dir, table)]
    counted = [rows for rows in lost if rows is not None]
    return sum(counted) if len(counted) == len(lost) else None


def to_table(header: Header, records: Records) -> pa.Table:
    """Records as Arrow columns; the segment's header goes along as metadata, without the layout of its bytes."""
    names = [name for name in records.dtype.names or () if name != COMMIT]
    about = {name: value for name, value in header.items() if name not in ("record", "rows")}
    nullable = nullable_names()
    columns = [_to_column(records[name], name in nullable) for name in names]
    return pa.table(columns, names=names, metadata={ABOUT: json.dumps(about)})


def _read_part(stem: Path) -> pa.Table:
    """A segment is deleted only after its Parquet file was read back, so where both exist the segment counts."""
    path = stem.with_suffix(SEGMENT)
    try:
        header, records, missing = read_segment(path)
    except FileNotFoundError:
        return read_parquet(stem.with_suffix(PARQUET))
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if missing:
        lost = f"rows {len(records)} to {len(records) + missing - 1} never reached the disk"
        warnings.warn(f"{path}: {lost}; reading ends there", stacklevel=3)
    return to_table(header, records)


def _header_of(stem: Path) -> Header:
    try:
        return read_segment(stem.with_suffix(SEGMENT)).header
    except FileNotFoundError:
        path = stem.with_suffix(PARQUET)
    try:
        return _about(pq.read_schema(path), path)
    except (OSError, pa.ArrowException) as error:
        raise RunLogError(
            f"{path}: not a readable Parquet file ({_first_line(error)}); restore it from a copy"
        ) from error


def _about(columns: pa.Schema, path: Path) -> Header:
    """What the segment's header said; nothing in a file of another origin."""
    try:
        about = json.loads((columns.metadata or {}).get(ABOUT, b"{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise RunLogError(f"{path}: what it says of itself is damaged; restore it from a copy")
    return about


def _to_column(values: NDArray[Any], nullable: bool) -> pa.Array:
    """A plain or fixed-size list column. Half precision is widened, since not every reader of Parquet knows it."""
    flat = np.ascontiguousarray(values).reshape(-1)
    flat = flat.astype(np.float32) if flat.dtype == np.float16 else flat
    array = pa.array(flat, mask=_unknown(flat) if nullable else None)
    return array if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(array, values.shape[1])


def _unknown(values: NDArray[Any]) -> NDArray[np.bool_]:
    missing: NDArray[np.bool_] = np.isnan(values) if values.dtype.kind == "f" else values == missing_value(values.dtype)
    return missing


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
