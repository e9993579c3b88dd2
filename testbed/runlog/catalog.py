"""Which runs there are and what each one was: from its manifest and the figures kept beside it, never from its rows."""

from __future__ import annotations

import difflib
import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from testbed.errors import RunLogError
from testbed.runlog.reader import Losses, losses, read_manifest
from testbed.runlog.schema import EVENTS, MANIFEST, SEGMENT, TABLES
from testbed.runlog.segment import new_file

RESULTS, PROBE = "results.json", "probe.json"
RUN_ID = re.compile(r"(\d{8}-\d{6})-.+")
TAIL_BYTES = 2**20  # of events.jsonl, in which a finished run's last prompt must stand
SHOWN_NAMES = 5


class State(str, Enum):
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"  # killed, interrupted, or ended by an error before its last prompt
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """One policy of a run. Fractions; None where the run was not summed up, or had nothing of it."""

    policy: str
    prefill_cut: float | None = None  # of the sum of block times against the first policy
    prefill_cut_low: float | None = None  # ... and its 95 % interval
    prefill_cut_high: float | None = None
    perplexity: float | None = None
    valid: bool | None = None


FIGURES = tuple(field.name for field in fields(PolicyFigures))[1:]


@dataclass(frozen=True, slots=True)
class Run:
    """A run's facts."""

    run: str
    directory: Path
    began: datetime | None  # UTC
    state: State
    size_bytes: int
    kind: str = "run"  # or "probe"
    model: str | None = None
    channel: str | None = None  # in words
    devices: tuple[str, ...] = ()
    emulated_devices: int = 0  # whose compute is padded to another device's
    policies: tuple[PolicyFigures, ...] = ()
    problem: str | None = None  # why it is unreadable
    losses: Losses | None = None  # rows of rounds and tokens; None where that cannot be read

    @property
    def compute(self) -> str | None:
        """Of the devices, in words; None where none is known."""
        emulated = f"emulated on {self.emulated_devices} of {len(self.devices)} devices"
        return None if not self.devices else emulated if self.emulated_devices else "measured"

    @property
    def summed_up(self) -> bool:
        return any(policy.valid is not None for policy in self.policies)

    def document(self) -> dict[str, Any]:
        """For machines."""
        began = None if self.began is None else self.began.isoformat()
        words = {"directory": str(self.directory), "began": began, "state": self.state.value, "compute": self.compute}
        lost = {"losses": None if self.losses is None else self.losses._asdict()}
        return {**asdict(self), **words, **lost}


def list_runs(logs: Path) -> list[Run]:
    """Every run directly under `logs`, the oldest first; also those that a damaged manifest makes unreadable.

    Raises RunLogError where `logs` is no folder.
    """
    if not logs.is_dir():
        raise RunLogError(f"{logs}: no such folder; name the one that holds the runs with --logs")
    return sorted(map(describe_run, _run_folders(logs)), key=_age)


def find_run(text: str, logs: Path) -> Path:
    """The folder of a run: `latest`, its name under `logs`, a part of it that only one has, or a path.

    `latest` is the one that began last of those that have a manifest. Raises RunLogError with the nearest name.
    """
    folders = list(_run_folders(logs)) if logs.is_dir() else []
    if text == "latest":
        begun = [folder for folder in folders if (folder / MANIFEST).exists()]
        if begun:
            return max(begun, key=lambda folder: (_began(folder) or _LONG_AGO, folder.name))
        raise RunLogError(f"{logs}: no runs here yet; start one with `testbed run`, or name its folder with --logs")
    for folder in (logs / text, Path(text)):
        if _is_run(folder):
            return folder
    names = sorted(folder.name for folder in folders)
    matching = [name for name in names if text and text in name]
    if len(matching) == 1:
        return logs / matching[0]
    nearest = matching or difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"did you mean {_any_of(nearest)}?" if nearest else f"`latest` or a run's name under {logs} is expected"
    raise RunLogError(f"no run {text!r}: {hint}")


def describe_run(run_dir: Path) -> Run:
    """One run's facts; raises no error for a damaged manifest, but says so in `problem`."""
    size_bytes = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
    run = Run(run_dir.name, run_dir, _began(run_dir), State.UNREADABLE, size_bytes, losses=_losses(run_dir))
    if not (run_dir / MANIFEST).exists():  # ended, or still on its way, before its nodes were started
        return replace(run, state=State.RUNNING if is_recorded(run_dir) else State.ABORTED)
    try:
        manifest = read_manifest(run_dir)
        return replace(run, state=_state(run_dir, manifest), **_facts(run_dir, manifest))
    except RunLogError as error:
        return replace(run, problem=str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{run_dir / MANIFEST}: not the manifest of a run ({type(error).__name__}: {error})"
        return replace(run, problem=problem)


def is_recorded(run_dir: Path) -> bool:
    """Whether a process records or seals it just now. Segments are there while it does, or after it was killed."""
    if not any(run_dir.glob(f"*{SEGMENT}")):
        return False
    try:
        with (run_dir / EVENTS).open("rb") as events:
            fcntl.flock(events, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def write_results(run_dir: Path, document: Mapping[str, Any]) -> Path:
    """Keep a run's figures beside its rows, so that a list of runs need not read them. NaN becomes null."""
    known = json.loads(json.dumps(document), parse_constant=lambda _: None)
    path = run_dir / RESULTS
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return path


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The figures kept; None where there are none, or not whole: they can be made again from the rows."""
    try:
        kept = json.loads((run_dir / RESULTS).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


_LONG_AGO = datetime.min.replace(tzinfo=timezone.utc)


def _age(run: Run) -> tuple[datetime, str]:
    return run.began or _LONG_AGO, run.run


def _run_folders(logs: Path) -> Iterator[Path]:
    return (folder for folder in logs.iterdir() if _is_run(folder))


def _is_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / EVENTS).is_file()


def _any_of(names: list[str]) -> str:
    more = f" or {len(names) - SHOWN_NAMES} others" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _began(run_dir: Path) -> datetime | None:
    """By its name, else by its first event: a sample need not be named after its time."""
    named = RUN_ID.fullmatch(run_dir.name)
    try:
        if named:
            return datetime.strptime(named[1], "%Y%m%d-%H%M%S").replace(tzinfo=timezone.utc)
        with (run_dir / EVENTS).open("rb") as events:
            return datetime.fromtimestamp(json.loads(events.readline())["realtime_ns"] // 10**9, timezone.utc)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _losses(run_dir: Path) -> Losses | None:
    try:
        return losses(run_dir, *TABLES)
    except (RunLogError, OSError):
        return None


def _facts(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    model, emulated = manifest.get("model") or {}, manifest.get("emulated") or {}
    return {
        "kind": "probe" if (run_dir / PROBE).exists() else "run",
        "model": f"{model['name']} ({model['type']})" if model else None,
        "channel": manifest.get("links"),
        "devices": tuple(manifest["devices"]),
        "emulated_devices": len(emulated.get("compute_flops_per_s", emulated)),  # older runs: by speed
        "policies": tuple(_figures(manifest["policies"], (read_results(run_dir) or {}).get("rows", ()))),
    }


def _figures(labels: list[str], rows: list[Mapping[str, Any]]) -> Iterator[PolicyFigures]:
    for index, label in enumerate(labels):
        row = rows[index] if index < len(rows) else {}
        yield PolicyFigures(label, *(row.get(name) for name in FIGURES))


def _state(run_dir: Path, manifest: Mapping[str, Any]) -> State:
    if any(run_dir.glob(f"*{SEGMENT}")):
        return State.RUNNING if is_recorded(run_dir) else State.ABORTED
    return State.FINISHED if _reached_its_end(run_dir, manifest) else State.ABORTED


def _reached_its_end(run_dir: Path, manifest: Mapping[str, Any]) -> bool:
    """The last prompt was done under the last policy. A manifest that does not say how many there are is believed."""
    workload = manifest["config"].get("workload")
    if workload is None or (run_dir / PROBE).exists():
        return True
    prompts = workload["score_prompts"] + (workload["generate_prompts"] if workload["new_tokens"] else 0)
    return _last_prompt(run_dir) == (len(manifest["policies"]) - 1, prompts - 1)


def _last_prompt(run_dir: Path) -> tuple[int, int] | None:
    try:
        with (run_dir / EVENTS).open("rb") as events:
            events.seek(max(0, events.seek(0, 2) - TAIL_BYTES))
            lines = events.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        if b'"kind": "scored"' in line or b'"kind": "generated"' in line:
            event = json.loads(line)
            return event["policy"], event["prompt"]
    return None
