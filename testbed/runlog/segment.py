"""A preallocated, memory-mapped file of fixed-width records that a killed process leaves whole.

    header (`segment_header.py`) | record 0 | record 1 | ... [| rows lost]

The pages belong to the kernel, so kill -9 loses nothing that was written. Disk space is reserved when the file is made:
a full disk is an error there and never a SIGBUS later. A record exists once it has its mark (`marks.py`), which also
tells whether a power cut took a part of it. Where the header says so, eight bytes at the end count the rows that found
no room while this segment was the newest: reserved as well, so that even a full disk takes the count.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.runlog import marks
from testbed.runlog.columns import COMMIT
from testbed.runlog.segment_header import CHECKED, LOST, NUMBERED, Header, describe_record, encode_header, read_header
from testbed.runlog.views import Views

TEMPORARY = ".tmp"

Records = NDArray[np.void]


class SegmentRows(NamedTuple):
    header: Header  # with `lost_rows`, those that found no room (None: not counted), and `missing_rows`
    records: Records  # every one that is whole, in the order they were written
    missing: int  # rows that were written and are not whole, or of a round that is not: a power cut, a damaged disk
    remains: bool  # something of these is still in the file


class Segment:
    """One segment, open for appending. `columns` are views of its fields; rows become valid with `commit`."""

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        dtype: np.dtype[Any],
        capacity: int,
        *,
        publish: bool = True,
        checked: bool = True,
    ) -> None:
        """Reserve the file; raises RunLogError, and leaves nothing, if the disk is too full.

        With `publish` False it keeps its temporary name until `publish` is called. A header with `lost_bytes` asks for
        a count of lost rows. Not `checked`: who writes the marks puts no checksum into them.
        """
        about = {**header, "rows": capacity, "record": describe_record(dtype)}
        head = encode_header(about, CHECKED if checked else NUMBERED)
        end, lost_bytes = len(head) + capacity * dtype.itemsize, header.get("lost_bytes", 0)
        self.path, self.capacity, self.used = path, capacity, 0
        self._synced: tuple[int, int] | None = None
        with _whole_or_not_at_all(path) as temporary:
            self._map = _map_new_file(temporary, head, end + lost_bytes)
            _sync(temporary, os.O_RDWR)
        records = np.frombuffer(self._map, dtype, capacity, offset=len(head))
        self.columns = Views(records)
        self._words_RW, self._mark_R = marks.words_of(records), records[COMMIT]
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
        self._mark_R[self.used : end] = marks.checked_marks(self.used + 1, self._words_RW[self.used : end])
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
        del self.columns, self._words_RW, self._mark_R, self._lost_C, self._map


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

    What a killed writer left half-written after the last committed record or round is not part of the answer. Where
    the marks hold no checksum, nothing behind the first gap can be told from what a power cut tore.
    """
    found = read_header(path)
    records = np.memmap(path, found.dtype, "r", offset=found.first_byte, shape=(found.rows,))
    lost = None if found.lost_at is None else int(np.memmap(path, LOST, "r", offset=found.lost_at, shape=(1,))[0])
    whole_R = _whole(records, found.checked)
    if not whole_R.all():  # once more: rows of a live segment may have been written while they were looked at
        whole_R = _whole(records, found.checked)
    whole_R = _of_whole_rounds(whole_R, found.rows_together)[: found.rows]
    taken, torn = records[: len(whole_R)], ~whole_R
    kept = np.asarray(taken[whole_R] if torn.any() else taken)
    missing, remains = int(torn.sum()), bool(marks.words_of(taken)[torn].any())
    header = {name: value for name, value in found.header.items() if name != "lost_bytes"}
    return SegmentRows({**header, "lost_rows": lost, "missing_rows": missing}, kept, missing, remains)


def _whole(records: Records, checked: bool) -> NDArray[np.bool_]:
    """Of the records up to the last one with a mark, those that can be relied on."""
    there_R = marks.numbered(records)
    end = int(there_R.nonzero()[0][-1]) + 1 if there_R.any() else 0
    return marks.whole(records[:end]) if checked else np.logical_and.accumulate(there_R[:end])


def _of_whole_rounds(whole_R: NDArray[np.bool_], together: int) -> NDArray[np.bool_]:
    """Only of rounds of which every row is whole: who reads `rounds` relies on one for each device. A last round that
    has only begun is none yet."""
    begun = len(whole_R) % together
    if whole_R[len(whole_R) - begun :].all():
        whole_R = whole_R[: len(whole_R) - begun]
    rounds = -(-len(whole_R) // together)
    padded_R = np.zeros(rounds * together, np.bool_)
    padded_R[: len(whole_R)] = whole_R
    return padded_R.reshape(rounds, together).all(axis=1).repeat(together)


def _map_new_file(path: Path, head: bytes, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        os.posix_fallocate(file, 0, size)
        os.pwrite(file, head, 0)
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _sync(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)
