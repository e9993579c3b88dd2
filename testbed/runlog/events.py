"""events.jsonl: rare events, one JSON object a line, and the lock of a run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from testbed.errors import RunLogError
from testbed.runlog.schema import EVENTS

TAIL_BYTES = 2**20


def hold(run_dir: Path) -> int:
    """Open the run's events for appending and lock them: a run has one recorder or one sealer. The kernel frees a lock
    whose process was killed."""
    path = run_dir / EVENTS
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise RunLogError(f"{path}: cannot be written ({error.strerror}); choose another logs folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise RunLogError(f"{run_dir}: this run is still being recorded; stop it first") from error
    return file


def append_event(file: int, kind: str, **fields: Any) -> None:
    """One line: JSON values and numpy scalars, NaN becomes null. Raises OSError, and leaves no part of it."""
    stamps = {"realtime_ns": time.time_ns(), "monotonic_ns": time.monotonic_ns()}
    known = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}
    line = json.dumps({**stamps, "kind": kind, **known}, default=_python_scalar, allow_nan=False).encode() + b"\n"
    size = os.fstat(file).st_size
    try:
        written = os.write(file, line)
    except OSError:
        os.ftruncate(file, size)
        raise
    if written != len(line):  # a full disk takes the first bytes of a line and only then refuses
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_what_was_torn(file: int) -> None:
    """What a crash left behind the last whole line is no event, and nothing can be appended to it. Raises OSError."""
    size = os.fstat(file).st_size
    first = max(0, size - TAIL_BYTES)
    tail = os.pread(file, size - first, first)
    end = len(tail)
    while end and not _is_event(tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]):
        end = tail.rfind(b"\n", 0, end - 1) + 1
    if end < len(tail) and (end or not first):
        os.ftruncate(file, first + end)


def _is_event(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _python_scalar(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an event cannot hold {type(value).__name__}")
