"""The demo's text: the source of Python's own standard library, which every machine has.

A twentieth of the files, chosen by a hash of their relative path, is held out: the demo model never saw them,
and because the path decides, the same file is held out under every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
# Third-party packages are not the library; lib2to3's test data is deliberately not valid Python.
EXCLUDED_PARTS = ("site-packages", "lib2to3/tests/data")


@dataclass(frozen=True, slots=True)
class Document:
    """One source file of the standard library."""

    path: str  # relative to the library's root, with forward slashes
    text: str


def is_held_out(relative_path: str) -> bool:
    """Whether a file is kept from training: a twentieth, by the sha256 of its relative path."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def standard_library() -> Path:
    """The root of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def documents(root: Path | None = None, *, held_out: bool) -> Iterator[Document]:
    """Files of the training or of the held-out part, in the order of their paths."""
    base = root or standard_library()
    paths = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.py"))
    for path in paths:
        if any(part in path for part in EXCLUDED_PARTS) or is_held_out(path) is not held_out:
            continue
        yield Document(path, (base / path).read_text(encoding="utf8", errors="ignore"))
