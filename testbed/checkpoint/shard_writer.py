"""Writes a safetensors file tensor by tensor, so that a shard need not fit in memory, and goes on with one begun."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch

from testbed.checkpoint.manifest import FileEntry
from testbed.checkpoint.tensor_files import DTYPE_NAMES
from testbed.errors import CheckpointError

Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype
PIECE_BYTES = 4 << 20  # written and hashed at once
WINDOW_BYTES = 32 << 20  # sent to the disk at once, and out of the page cache a few windows later
WINDOWS_KEPT = 4
BEHIND_BYTES = 256 << 20  # by which hashing may be behind


def file_bytes(entries: Entries) -> int:
    """Size of the file."""
    return len(file_header(entries)) + sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries.values())


def file_header(entries: Entries) -> bytes:
    header, end = {}, 0
    for name, (shape, dtype) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; no copy where it is contiguous."""
    view: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return view


class Hashing:
    """Takes sha256 in a thread while others write; what is to be hashed is kept in memory until then."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._behind: deque[tuple[int, Future[None]]] = deque()
        self._behind_bytes = 0

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, digest: hashlib._Hash, data: memoryview) -> None:
        self.wait(BEHIND_BYTES)
        self._behind.append((len(data), self._pool.submit(digest.update, data)))
        self._behind_bytes += len(data)

    def wait(self, behind_bytes: int = 0) -> None:
        """Until no more than this is left to be hashed."""
        while self._behind_bytes > behind_bytes:
            size, hashed = self._behind.popleft()
            hashed.result()
            self._behind_bytes -= size


class ShardWriter:
    """`entries` says beforehand what will come, in this order. sha256 is taken on the way, by `hashing`.

    `begun`: what a file that is there already held when its writing was last known to be whole; it is cut off there
    and read once. Raises CheckpointError if it holds something else.
    """

    def __init__(self, path: Path, entries: Entries, hashing: Hashing, begun: FileEntry | None = None) -> None:
        header = file_header(entries)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in entries.values()]
        ends = list(accumulate(sizes, initial=len(header)))
        self._expected = list(entries.items())
        self._digest, self._hashing, self._path = hashlib.sha256(), hashing, path
        self._next = self.bytes = self._sent_bytes = 0
        if begun is None:
            self._file: BinaryIO = path.open("wb")
            self._write(memoryview(header))
        else:
            if begun.bytes not in ends:
                raise CheckpointError(f"{path}: {begun.bytes} bytes do not end with one of its tensors")
            self._next, self.bytes = ends.index(begun.bytes), begun.bytes
            self._file = path.open("r+b")
            self._read_back(begun)

    def add(self, name: str, pieces: Sequence[torch.Tensor]) -> None:
        """The next tensor, in pieces along its first axis. Raises ValueError for one that was not announced here."""
        shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:]) if pieces[0].dim() else ()
        dtypes = {piece.dtype for piece in pieces}
        if self._next == len(self._expected) or {(name, (shape, dtype)) for dtype in dtypes} != {
            self._expected[self._next]
        }:
            raise ValueError(f"{name} {list(shape)} {dtypes} is not the tensor that comes next")
        self._next += 1
        for piece in pieces:
            self._write(raw_bytes(piece))

    def mark(self) -> FileEntry:
        """What the file holds up to here."""
        self._file.flush()
        self._hashing.wait()
        return FileEntry(sha256=self._digest.copy().hexdigest(), bytes=self.bytes)

    def sync(self) -> None:
        """Brings to the disk what was flushed; may be called from another thread."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def finish(self) -> FileEntry:
        """Closes the file once it is on the disk. Raises ValueError if a tensor is missing."""
        if self._next < len(self._expected):
            raise ValueError(f"{self._expected[self._next][0]} was announced and not written")
        entry = self.mark()
        os.fsync(self._file.fileno())
        self.close()
        return entry

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._hashing.update(self._digest, piece)
            self._file.write(piece)
            self.bytes += len(piece)
            if self.bytes - self._sent_bytes >= WINDOW_BYTES:
                self._send_window()

    def _send_window(self) -> None:
        """Starts to bring the latest window to the disk and gives the memory of those that are there to the next.

        Fresh pages for all of a large file cost more than to hash and copy it: a virtual machine may have to ask its
        host for each.
        """
        start = max(0, self._sent_bytes - WINDOWS_KEPT * WINDOW_BYTES)
        os.posix_fadvise(self._file.fileno(), start, self.bytes - start, os.POSIX_FADV_DONTNEED)
        self._sent_bytes = self.bytes

    def _read_back(self, begun: FileEntry) -> None:
        left = begun.bytes
        while left and (piece := self._file.read(min(PIECE_BYTES, left))):
            self._digest.update(piece)
            left -= len(piece)
        if left or self._digest.hexdigest() != begun.sha256:
            self.close()
            raise CheckpointError(f"{self._path}: is not what was written there")
        self._file.truncate(begun.bytes)
        self._file.seek(begun.bytes)
