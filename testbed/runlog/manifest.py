"""A run's folder: its name and its manifest."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from testbed.errors import RunLogError
from testbed.runlog.schema import CONFIG, MANIFEST, SCHEMA_VERSION
from testbed.runlog.segment import new_file

PACKAGES = ("numpy", "numba", "pyarrow", "pyzmq", "msgspec", "safetensors", "torch", "transformers")
CHECKOUT = Path(__file__).resolve().parents[2]


def environment(**versions: str) -> dict[str, Any]:
    """This machine and its software, nothing imported for it; `versions` adds what only the caller knows (libzmq)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None} | versions,
        "git": _git_revision(),
    }


def new_run_directory(root: Path, name: str) -> Path:
    """Make `root/YYYYmmdd-HHMMSS-name` (UTC), always a new folder; raises RunLogError if the name cannot be used."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise RunLogError(f"run name {name!r}: use up to 64 letters, digits, '.', '_' and '-', a letter or digit first")
    run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + name
    for attempt in count(1):
        run_dir = root / (run_id if attempt == 1 else f"{run_id}-{attempt:02d}")
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            if not root.is_dir():
                raise RunLogError(f"{root}: not a folder; choose another one for the logs") from None
        except OSError as error:
            raise RunLogError(f"{run_dir}: cannot be made ({error.strerror}); choose another logs folder") from error
    return run_dir


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> Path:
    """Write or replace manifest.json; a killed process leaves the old one or the new one."""
    text = json.dumps({"schema": SCHEMA_VERSION, **manifest}, indent=2, ensure_ascii=False, allow_nan=False)
    return _write(run_dir / MANIFEST, text + "\n")


def write_config(run_dir: Path, text: str) -> Path:
    """Keep the run file as it was given."""
    return _write(run_dir / CONFIG, text)


def _write(path: Path, text: str) -> Path:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else None


def _git_revision() -> str | None:
    """Commit of the checkout this program runs from, with `+` if files were changed; None outside a checkout."""
    if not (CHECKOUT / ".git").exists():
        return None
    revision = _git("rev-parse", "HEAD")
    return revision and revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", CHECKOUT, *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
