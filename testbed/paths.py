"""Folders of this user, after the XDG base directory specification. Those that are made are private (0700)."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from testbed.errors import ConfigError

FOLDER = "wdmoe-testbed"
PRIVATE = 0o700


def cache_directory() -> Path:
    """What may be made again: split checkpoints, compiled code. Made if it is not there."""
    base = _absolute("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = base / FOLDER
    folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    return folder


def state_directory() -> Path:
    """What is worth keeping and belongs to no run's folder: a node's own rows. Not made."""
    return (_absolute("XDG_STATE_HOME") or Path.home() / ".local" / "state") / FOLDER


def runtime_directory() -> Path:
    """What must not outlive the session and nobody else may read: the keys of a run. Made if it is not there.

    XDG_RUNTIME_DIR where there is one, else a folder of this user in the temporary directory.
    Raises ConfigError where another user could read it.
    """
    base = _absolute("XDG_RUNTIME_DIR")
    if base is not None and base.is_dir():
        folder = base / FOLDER
    else:
        folder = Path(tempfile.gettempdir()) / f"{FOLDER}-{os.getuid()}"
    try:
        folder.mkdir(mode=PRIVATE, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made ({error.strerror}); set XDG_RUNTIME_DIR to a folder of yours"
        ) from error
    _refuse_unless_private(folder)
    return folder


def _refuse_unless_private(folder: Path) -> None:
    """Anyone may have put this name into a shared temporary directory before us."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(
            f"{folder}: is not a folder of this user; remove it or set XDG_RUNTIME_DIR to a folder of yours"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder}: others can open it; chmod 700 it, keys are kept there")


def _absolute(variable: str) -> Path | None:
    """An XDG variable; the specification says to ignore relative paths."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else None
