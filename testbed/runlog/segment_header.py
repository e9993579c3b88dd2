"""What stands before a segment's records, checked before anything in it is believed.

    magic, version, header size, crc32 | JSON header, padded to whole pages

The JSON describes the records for any reader. `version` tells how their marks are made (`marks.py`).
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from testbed.errors import RunLogError
from testbed.runlog.columns import COMMIT
from testbed.runlog.marks import WORD
from testbed.runlog.schema import SCHEMA_VERSION

MAGIC = b"WDMOELOG"
PREAMBLE = struct.Struct("<8sIII")
LOST = np.dtype("<u8")
NUMBERED, CHECKED = 1, 2  # versions: marks are numbers of rows; they hold a checksum of the row as well
MAX_HEADER_BYTES, MAX_ROWS, MAX_RECORD_BYTES = 2**22, 2**27, 2**24

Header = dict[str, Any]
Natural = Annotated[int, Meta(ge=0, le=MAX_RECORD_BYTES)]
Format = Annotated[str, Meta(pattern=r"^([<|]?[biuf][1248]|\?|\|b1)$")]
Field = tuple[Annotated[str, Meta(min_length=1)], Format, Annotated[list[Natural], Meta(max_length=1)], Natural]


class _Record(msgspec.Struct, frozen=True):
    itemsize: Annotated[int, Meta(ge=WORD.itemsize, le=MAX_RECORD_BYTES, multiple_of=WORD.itemsize)]
    fields: Annotated[list[Field], Meta(min_length=1)]


class _Needed(msgspec.Struct, frozen=True):
    """What reading rests on; more may stand in a header."""

    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]  # for which there is room
    record: _Record
    lost_bytes: Literal[0, 8] = 0  # behind them, a count of rows without room
    table: str = ""
    devices: list[str] = []


class Found(NamedTuple):
    """A header that was checked, against the size of its file too."""

    header: Header  # as it stands in the file
    rows: int
    dtype: np.dtype[Any]
    first_byte: int  # of the records
    lost_at: int | None  # byte at which rows without room are counted
    checked: bool  # marks hold checksums
    rows_together: int  # written at once: a round's, one for each device


def encode_header(header: Mapping[str, Any], version: int) -> bytes:
    text = json.dumps(header).encode()
    size = -(-(PREAMBLE.size + len(text)) // mmap.PAGESIZE) * mmap.PAGESIZE
    body = text.ljust(size - PREAMBLE.size)
    return PREAMBLE.pack(MAGIC, version, size, zlib.crc32(body)) + body


def describe_record(dtype: np.dtype[Any]) -> Header:
    fields = [[name, of.base.str, list(of.shape), offset] for name, (of, offset, *_) in (dtype.fields or {}).items()]
    return {"itemsize": dtype.itemsize, "fields": fields}


def read_header(path: Path) -> Found:
    """Raises RunLogError for anything but a whole segment, FileNotFoundError if it went away."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        preamble = file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
            raise RunLogError(f"{path}: not a segment of a run log; remove it from the run's folder")
        _, version, first_byte, crc = PREAMBLE.unpack(preamble)
        if version not in (NUMBERED, CHECKED):
            known = f"{NUMBERED} and {CHECKED}"
            raise RunLogError(
                f"{path}: segment format {version}, this program reads {known}; use the one that wrote it"
            )
        if not PREAMBLE.size <= first_byte <= MAX_HEADER_BYTES:
            raise _damaged(path, f"it is said to be {first_byte} bytes long")
        body = file.read(first_byte - PREAMBLE.size)
    try:
        header: Header = json.loads(body if zlib.crc32(body) == crc else b"")
        refuse_newer(header, path)
        needed = msgspec.convert(header, _Needed)
        dtype = _dtype_of(needed.record)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    end = first_byte + needed.rows * dtype.itemsize
    if size_bytes < end + needed.lost_bytes:
        raise RunLogError(f"{path}: shorter than its header says; it was truncated, restore it from a copy")
    together = max(1, len(needed.devices)) if needed.table == "rounds" else 1
    lost_at = end if needed.lost_bytes else None
    return Found(header, needed.rows, dtype, first_byte, lost_at, version == CHECKED, together)


def refuse_newer(header: Mapping[str, Any], path: Path) -> None:
    """Columns may mean something else in a log of a newer program: raises RunLogError. Older ones only lack some."""
    version = header.get("schema", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RunLogError(
            f"{path}: its log has schema {version}, this program knows {SCHEMA_VERSION} and older; update the testbed"
        )


def _dtype_of(record: _Record) -> np.dtype[Any]:
    """Raises ValueError where the fields do not fit, or the mark is not the record's last word."""
    names, formats, shapes, offsets = zip(*record.fields, strict=True)
    fields = [(kind, tuple(shape)) for kind, shape in zip(formats, shapes, strict=True)]
    layout = {"names": names, "formats": fields, "offsets": offsets, "itemsize": record.itemsize}
    dtype: np.dtype[Any] = np.dtype(layout)  # type: ignore[call-overload]  # numpy's stubs want lists of literals
    if dict(dtype.fields or {}).get(COMMIT) != (WORD, record.itemsize - WORD.itemsize):
        raise ValueError(f"its records do not end with {COMMIT!r}")
    return dtype


def _damaged(path: Path, why: str) -> RunLogError:
    return RunLogError(f"{path}: its header is damaged ({why[:200]}); restore the file from a copy")
