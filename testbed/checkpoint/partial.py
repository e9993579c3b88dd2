"""The folder in which a split grows, beside the one that it becomes when it is whole; what is in it outlasts a kill.

What is known to be written stands in a journal: bytes and sha256 of every file at one moment. A split that is started
again reads that much of them once and goes on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from testbed.checkpoint.manifest import FileEntry, FileName, Sha256
from testbed.checkpoint.shard_writer import ShardWriter
from testbed.errors import CheckpointError

JOURNAL_NAME, NEW_JOURNAL_NAME = "begun.json", "begun.new"
KEEP_EVERY_BYTES = 512 << 20


class Journal(BaseModel):
    """`steps` of the job are done; `files` are how they were then; `checksums` those of the tensors so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Sha256
    steps: int = Field(ge=0)
    files: dict[FileName, FileEntry]
    checksums: dict[str, int]


class Partial:
    """The folder, locked: a second split of the same name waits. Kept if interrupted, removed on a CheckpointError."""

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir.parent / f".{out_dir.name}.partial"
        self._out_dir = out_dir

    def __enter__(self) -> Partial:
        self._out_dir.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self._is_still_there():
                return self
            os.close(self._lock)  # while we waited, the other one finished

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, CheckpointError):
            self.remove()
        os.close(self._lock)

    def journal(self, identity: str) -> Journal | None:
        """How far this very job got; what another one has left is removed."""
        try:
            journal = Journal.model_validate_json((self.path / JOURNAL_NAME).read_bytes())
            if journal.identity == identity:
                return journal
        except (OSError, ValidationError):
            pass
        self.clear()
        return None

    def clear(self) -> None:
        for left in self.path.iterdir():
            left.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def become(self, out_dir: Path) -> None:
        """The folder gets its name once all that is in it is on the disk."""
        for name in (JOURNAL_NAME, NEW_JOURNAL_NAME):
            (self.path / name).unlink(missing_ok=True)
        for path in (*self.path.iterdir(), self.path):
            sync(path)
        self.path.rename(out_dir)
        sync(out_dir.parent)

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._lock), self.path.stat())
        except FileNotFoundError:
            return False


class Keeper:
    """Brings what was written to the disk and into the journal, in a thread, while the next is written."""

    def __init__(self, partial: Partial, identity: str, writers: Mapping[str, ShardWriter]) -> None:
        self._path, self._identity, self._writers = partial.path / JOURNAL_NAME, identity, writers
        self._pool = ThreadPoolExecutor(1)
        self._kept: Future[None] | None = None
        self._kept_bytes = self._bytes()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    def keep_now_and_then(self, steps: int, checksums: Mapping[str, int]) -> None:
        if self._bytes() - self._kept_bytes >= KEEP_EVERY_BYTES:
            self.keep(steps, checksums)

    def keep(self, steps: int, checksums: Mapping[str, int]) -> None:
        self.wait()
        self._kept_bytes = self._bytes()
        files = {name: writer.mark() for name, writer in self._writers.items()}
        journal = Journal(identity=self._identity, steps=steps, files=files, checksums=dict(checksums))
        self._kept = self._pool.submit(self._write, journal, list(self._writers.values()))

    def wait(self) -> None:
        """Raises OSError if what was to be kept could not be."""
        if self._kept is not None:
            self._kept.result()
            self._kept = None

    def _write(self, journal: Journal, writers: Iterable[ShardWriter]) -> None:
        for writer in writers:
            writer.sync()
        new = self._path.with_name(NEW_JOURNAL_NAME)
        new.write_text(journal.model_dump_json())
        sync(new)
        new.replace(self._path)

    def _bytes(self) -> int:
        return sum(writer.bytes for writer in self._writers.values())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
