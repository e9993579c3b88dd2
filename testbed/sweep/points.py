"""Finished points of a sweep, one JSON file each, so that the same command goes on where it was ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.runlog.segment import new_file
from testbed.sweep.grid import Grid, Point

SWEEP, POINTS, LOCK = "sweep.json", "points", "sweep.lock"

Document = dict[str, Any]
PointRunner = Callable[[RunConfig], Mapping[str, Any]]  # answers {"kind", "rows", ...} as `--json` would print it


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sweep's points have in common besides the run file. kind: simulated | measured."""

    kind: str
    draws: int | None = None  # None: as many as the simulation takes by itself


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a point: its document, or the reason why it has none."""

    document: Document | None
    reason: str | None
    seconds: float


def attempt(run_point: PointRunner, config: RunConfig) -> Outcome:
    """Run one point. Whatever goes wrong with it becomes one line; only an interrupt and a package
    that is not installed go through."""
    began_s = time.monotonic()
    document, reason = None, None
    try:
        document = _plain(run_point(config))
    except ModuleNotFoundError:  # every other point would fail of it too
        raise
    except Exception as error:  # one point's fault, of whatever kind, must not end the others
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(document, reason, time.monotonic() - began_s)


def _plain(document: Mapping[str, Any]) -> Document:
    """As JSON has it, with null for what is unknown (NaN)."""
    plain: Document = json.loads(json.dumps(document), parse_constant=_unknown)
    return plain


def _unknown(constant: str) -> None:
    if constant != "NaN":
        raise ValueError(f"a figure of it is {constant}")


@contextmanager
def point_store(out: Path, grid: Grid, asked: Asked) -> Iterator[PointStore]:
    """The folder of a sweep, for this process alone. Raises ConfigError where it holds another sweep or is in use."""
    (out / POINTS).mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: a sweep is running here; wait for its end, or name another --out") from None
        wanted = {**asdict(asked), "axes": grid.axes, "config": _dump(grid.base)}
        if (out / SWEEP).exists():
            _refuse_another(out, _read(out / SWEEP), wanted)
        else:
            _write(out / SWEEP, wanted)
        yield PointStore(out, asked)


@dataclass(frozen=True, slots=True)
class PointStore:
    """The finished points in a sweep's folder."""

    out: Path
    asked: Asked

    def path(self, point: Point) -> Path:
        """Named after everything that decides the point's result."""
        decides = {**asdict(self.asked), "config": _dump(point.config)}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return self.out / POINTS / f"{digest[:16]}.json"

    def outcome(self, point: Point) -> Outcome | None:
        """What became of a point; None while it was not tried, or its file is damaged."""
        kept = _read(self.path(point))
        try:
            return Outcome(kept["document"], kept["reason"], kept["seconds"])
        except KeyError:
            return None

    def is_done(self, point: Point) -> bool:
        outcome = self.outcome(point)
        return outcome is not None and outcome.document is not None

    def keep(self, point: Point, outcome: Outcome) -> None:
        """A killed process leaves the whole file or none."""
        _write(self.path(point), {"axes": dict(point.axes), **asdict(outcome)})


def _dump(config: RunConfig) -> Document:
    return config.model_dump(mode="json", by_alias=True)


def _read(path: Path) -> Document:
    """A file of ours; empty where it is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Document) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _refuse_another(out: Path, kept: Document, wanted: Document) -> None:
    wanted = json.loads(json.dumps(wanted))
    differs = [key for key in wanted if kept.get(key) != wanted[key]]
    if "config" in differs and isinstance(kept.get("config"), dict):
        sections = [key for key in wanted["config"] if kept["config"].get(key) != wanted["config"][key]]
        differs = [key for key in differs if key != "config"] + sections
    if differs:
        raise ConfigError(f"{out}: holds another sweep ({', '.join(differs)} differ); name another folder with --out")
