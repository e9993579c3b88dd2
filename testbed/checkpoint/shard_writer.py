"""Writes a safetensors file tensor by tensor, so that a shard need not fit in memory, and goes on with one begun."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch

from testbed.checkpoint.manifest import FileEntry
from testbed.checkpoint.tensor_files import DTYPE_NAMES
from testbed.errors import CheckpointError

Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype
PIECE_BYTES = 8 << 20
WRITE_BYTES = 256 << 10  # written at once


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


class ShardWriter:
    """`entries` says beforehand what will come, in this order. sha256 is taken on the way, by a thread of `hashing`.

    `begun`: what a file that is there already held when its writing was last known to be whole; it is cut off there
    and read once. Raises CheckpointError if it holds something else.
    """

    def __init__(self, path: Path, entries: Entries, hashing: Executor, begun: FileEntry | None = None) -> None:
        header = file_header(entries)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in entries.values()]
        ends = list(accumulate(sizes, initial=len(header)))
        self._expected = list(entries.items())
        self._digest, self._hashing, self._path = hashlib.sha256(), hashing, path
        if begun is None:
            self._next, self.bytes = 0, 0
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
        hashed = self._hashing.submit(self._digest.update, data)
        try:
            for start in range(0, len(data), WRITE_BYTES):
                self._file.write(data[start : start + WRITE_BYTES])
        finally:
            hashed.result()  # `data` may be mapped memory that is gone afterwards
        self.bytes += len(data)

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
