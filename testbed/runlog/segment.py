"""A preallocated, memory-mapped file of fixed-width records that a killed process leaves whole.

    magic, version, header size, crc32 | JSON header, padded to whole pages | record 0 | record 1 | ... [| rows lost]

The pages belong to the kernel, so kill -9 loses nothing that was written. Disk space is reserved when the file is made:
a full disk is an error there and never a SIGBUS later. The JSON header describes the records for any reader. Where it
says so, eight bytes at the end count the rows that found no room while this segment was the newest: reserved as well,
so that even a full disk takes the count.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.runlog.schema import COMMIT, SCHEMA_VERSION
from testbed.runlog.views import Views

TEMPORARY = ".tmp"
MAGIC = b"WDMOELOG"
VERSION = 1
PREAMBLE = struct.Struct("<8sIII")
LOST = np.dtype("<u8")

Header = dict[str, Any]
Records = NDArray[np.void]


class SegmentRows(NamedTuple):
    header: Header
    records: Records  # committed, without a gap, in the order they were written
    missing: int  # rows lost right after them although later ones exist: only a power cut or a damaged disk does that


class Segment:
    """One segment, open for appending. `columns` are views of its fields; rows become valid with `commit`."""

    def __init__(
        self, path: Path, header: Mapping[str, Any], dtype: np.dtype[Any], capacity: int, *, publish: bool = True
    ) -> None:
        """Reserve the file; raises RunLogError, and leaves nothing, if the disk is too full.

        With `publish` False it keeps its temporary name until `publish` is called. A header with `lost_bytes` asks for
        a count of lost rows.
        """
        head = _encode_header({**header, "rows": capacity, "record": _describe(dtype)})
        end, lost_bytes = len(head) + capacity * dtype.itemsize, header.get("lost_bytes", 0)
        self.path, self.capacity, self.used = path, capacity, 0
        self._synced: tuple[int, int] | None = None
        with _whole_or_not_at_all(path) as temporary:
            self._map = _map_new_file(temporary, head, end + lost_bytes)
            _sync(temporary, os.O_RDWR)
        records = np.frombuffer(self._map, dtype, capacity, offset=len(head))
        self.columns = Views(records)
        self._commit = records[COMMIT]
        self._lost_C: NDArray[np.uint64] = np.frombuffer(self._map, LOST, lost_bytes // LOST.itemsize, offset=end)
        if publish:
            self.publish()
            _sync(path.parent, os.O_RDONLY)

    def publish(self) -> None:
        """Give the file its name, by which readers and the sealer find it; raises RunLogError if that cannot be."""
        with _whole_or_not_at_all(self.path) as temporary:
            temporary.rename(self.path)

    def commit(self, count: int) -> None:
        """The next `count` rows are complete: the only write that makes them exist."""
        end = self.used + count
        self._commit[self.used : end] = np.arange(self.used + 1, end + 1, dtype=np.uint64)
        self.used = end

    def count_lost(self, rows: int) -> None:
        """So many rows found no room; counting them takes none."""
        self._lost_C[0] += np.uint64(rows)

    def flush(self) -> None:
        """Bring a published segment's rows to the disk: from here on they survive a power cut. Raises OSError.

        By another thread than the one that appends: msync would hold the interpreter, fdatasync does not.
        """
        state = (self.used, int(self._lost_C.sum()))
        if state == self._synced:
            return
        _sync(self.path, os.O_RDWR)
        if self._synced is None:
            _sync(self.path.parent, os.O_RDONLY)
        self._synced = state

    def close(self) -> None:
        """Let go of the memory: as long as a process holds it, a deleted file keeps its room on the disk."""
        del self.columns, self._commit, self._lost_C, self._map


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` once the block has ended well: whole and on disk, or not there at all."""
    with _whole_or_not_at_all(path) as temporary:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.rename(path)
        _sync(path.parent, os.O_RDONLY)


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """The temporary name of `path`, removed where the block fails; an OSError becomes a RunLogError."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            hint = "free disk space or choose another folder for the logs"
            raise RunLogError(f"{path}: cannot be written ({error.strerror or error}); {hint}") from error
        raise


def read_segment(path: Path) -> SegmentRows:
    """Rows of a live or left-over segment; raises RunLogError for any other file, FileNotFoundError if it went away.

    What a killed writer left half-written after the last committed record is not part of the answer. The header tells
    as `lost_rows` how many rows found no room; None for a segment of an older program, which did not count them.
    """
    header, first_byte, dtype = _read_header(path)
    capacity, lost_bytes = header["rows"], header.pop("lost_bytes", 0)
    end = first_byte + capacity * dtype.itemsize
    if path.stat().st_size < end + lost_bytes:
        raise RunLogError(f"{path}: shorter than its header says; it was truncated, restore it from a copy")
    records = np.memmap(path, dtype, "r", offset=first_byte, shape=(capacity,))
    header["lost_rows"] = int(np.memmap(path, LOST, "r", offset=end, shape=(1,))[0]) if lost_bytes else None
    count, missing = _count_committed(records[COMMIT])
    return SegmentRows(header, np.asarray(records[:count]), missing)


def refuse_newer(header: Mapping[str, Any], path: Path) -> None:
    """Columns may mean something else in a log of a newer program: raises RunLogError. Older ones only lack some."""
    version = header.get("schema", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RunLogError(
            f"{path}: its log has schema {version}, this program knows {SCHEMA_VERSION} and older; update the testbed"
        )


def _count_committed(commit: NDArray[np.uint64]) -> tuple[int, int]:
    """Rows up to the first one without its mark, and how many rows are missing before the next one that has it."""
    marked = commit == np.arange(1, len(commit) + 1, dtype=np.uint64)
    count = len(marked) if marked.all() else int(np.argmin(marked))
    later = marked[count:]
    return count, int(np.argmax(later)) if later.any() else 0


def _map_new_file(path: Path, head: bytes, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        os.posix_fallocate(file, 0, size)
        os.pwrite(file, head, 0)
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _encode_header(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    size = -(-(PREAMBLE.size + len(text)) // mmap.PAGESIZE) * mmap.PAGESIZE
    body = text.ljust(size - PREAMBLE.size)
    return PREAMBLE.pack(MAGIC, VERSION, size, zlib.crc32(body)) + body


def _read_header(path: Path) -> tuple[Header, int, np.dtype[Any]]:
    with path.open("rb") as file:
        preamble = file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
            raise RunLogError(f"{path}: not a segment of a run log; remove it from the run's folder")
        _, version, size, crc = PREAMBLE.unpack(preamble)
        if version != VERSION:
            raise RunLogError(
                f"{path}: segment format {version}, this program reads {VERSION}; use the one that wrote it"
            )
        body = file.read(max(0, min(size, path.stat().st_size) - PREAMBLE.size))
    try:
        header: Header = json.loads(body if zlib.crc32(body) == crc else b"")
        refuse_newer(header, path)
        return header, size, _dtype_of(header["record"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunLogError(f"{path}: its header is damaged ({error}); restore the file from a copy") from error


def _describe(dtype: np.dtype[Any]) -> Header:
    fields = [[name, of.base.str, list(of.shape), offset] for name, (of, offset, *_) in (dtype.fields or {}).items()]
    return {"itemsize": dtype.itemsize, "fields": fields}


def _dtype_of(record: Header) -> np.dtype[Any]:
    names, formats, shapes, offsets = zip(*record["fields"], strict=True)
    fields = [(kind, tuple(shape)) for kind, shape in zip(formats, shapes, strict=True)]
    layout = {"names": names, "formats": fields, "offsets": offsets, "itemsize": record["itemsize"]}
    dtype: np.dtype[Any] = np.dtype(layout)  # type: ignore[call-overload]  # numpy's stubs want lists of literals
    if dtype.hasobject or COMMIT not in names:
        raise ValueError("record")
    return dtype


def _sync(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)
