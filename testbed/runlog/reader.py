"""Reads a run's log, sealed or live, whole or left behind by a killed process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.runlog.columns import COMMIT, missing_value, nullable_names
from testbed.runlog.schema import EVENTS, MANIFEST, PARQUET, SEGMENT, TABLES
from testbed.runlog.segment import Records, read_segment
from testbed.runlog.segment_header import Header, refuse_newer

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


class Losses(NamedTuple):
    """Rows that were recorded and are not in the log."""

    full_disk: int | None  # that found no room; None where a file is of a program that did not count them
    missing: int  # that a power cut or a damaged disk took, in whole rounds

    def __str__(self) -> str:
        why = {"lost on a full disk": self.full_disk, "missing after a power cut or on a damaged disk": self.missing}
        return ", ".join(f"{rows} {reason}" for reason, rows in why.items() if rows)

    def __bool__(self) -> bool:
        return bool(self.full_disk or self.missing)


def losses(run_dir: Path, *tables: str) -> Losses:
    """What the files of these tables say of that, sealed or not. Raises RunLogError as `read_table` does."""
    headers = [_header_of(run_dir / name) for table in tables for name in _parts(run_dir, table)]
    counted = [header["lost_rows"] for header in headers if header.get("lost_rows") is not None]
    full_disk = sum(counted) if len(counted) == len(headers) else None
    return Losses(full_disk, sum(header.get("missing_rows") or 0 for header in headers))


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
        header, records, missing, _ = read_segment(path)
    except FileNotFoundError:
        return read_parquet(stem.with_suffix(PARQUET))
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if missing:
        warnings.warn(f"{path}: {missing} rows never reached the disk, or not whole; the others are read", stacklevel=3)
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
