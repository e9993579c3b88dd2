"""Commands of this project as a user starts them, in processes of their own, with all their descendants in view."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow.compute as pc

from testbed.runlog.reader import read_events, read_table
from testbed.runlog.schema import EVENTS

MARK = "TESTBED_TEST_MARK"  # inherited by every descendant, whoever its parent is by then
TESTBED = str(Path(sys.executable).with_name("testbed"))
JETSON_NODE = (sys.executable, "-m", "jetson_node")
LOOK_EVERY_S = 0.05
EXACT = """
[wire]  # exact: what int8 rounds, the company in a batch may tip over
down = "fp32"
up = "fp32"

[timeouts]  # of a machine that is busy with other things
silence_s = 60.0
reply_s = 60.0
join_s = 90.0
"""

T = TypeVar("T")


def until(found: Callable[[], T | None], within_s: float, what: str) -> T:
    """The first answer that is true; fails when there is none in time."""
    deadline_s = time.monotonic() + within_s
    while not (answer := found()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: not within {within_s} s")
        time.sleep(LOOK_EVERY_S)
    return answer


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was started. `runtime` is where it keeps the keys of a run."""

    process: subprocess.Popen[str]
    mark: str
    runtime: Path

    def finish(self, within_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Wait for its end; its output is complete only when its last descendant is gone too."""
        out, error = self.process.communicate(timeout=within_s)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, error)

    def alive(self) -> list[psutil.Process]:
        """The command and all its descendants that still run."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        return False

    def wait_until_nothing_runs(self, within_s: float = 10) -> None:
        until(lambda: not self.alive(), within_s, f"end of {self.process.args!r} and what it started")

    def node(self, run_dir: Path, name: str) -> psutil.Process:
        """The process of a node, known by where its output goes."""
        output = str(run_dir / "nodes" / f"{name}.log")
        return until(lambda: next((p for p in self.alive() if _writes_to(p, output)), None), 20, f"process of {name}")


def _writes_to(process: psutil.Process, path: str) -> bool:
    with suppress(OSError):
        return str(Path(f"/proc/{process.pid}/fd/1").readlink()) == path
    return False


@contextmanager
def started(argv: Sequence[str], folder: Path) -> Iterator[Command]:
    """Start a command with runtime folder and working directory in `folder`; nothing of it is left running after."""
    mark, runtime = uuid.uuid4().hex, folder / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    private = {"XDG_RUNTIME_DIR": str(runtime), "XDG_CACHE_HOME": str(folder.parent / "cache"), MARK: mark}
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env={**os.environ, **private},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    command = Command(process, mark, runtime)
    try:
        yield command
    finally:
        for left in command.alive():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.communicate(timeout=10)


def run(argv: Sequence[str], folder: Path, within_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and see that nothing of it is left."""
    with started(argv, folder) as command:
        done = command.finish(within_s)
        command.wait_until_nothing_runs()
        return done


def run_file(
    folder: Path,
    text: str = "",
    *,
    devices: Sequence[str] = ("",) * 8,
    policies: Sequence[str] = ('name = "topk"',),
) -> Path:
    """Write a run file whose logs go to `logs` beside it. `devices` and `policies` are lines of their tables."""
    tables = [f'[[device]]\nname = "jetson-{n}"\n{device}' for n, device in enumerate(devices)]
    tables += [f"[[policy]]\n{policy}" for policy in policies]
    log = f'[log]\ndirectory = "{folder / "logs"}"\nsegment_rows = 4096'
    path = folder / "run.toml"
    path.write_text("\n".join(['name = "test"', text, *tables, log, ""]))
    return path


class Log:
    """The log of a command's only run, as it grows in the folder `logs`."""

    def __init__(self, command: Command, logs: Path) -> None:
        self._command = command
        self.run_dir: Path = self.wait(lambda: next((path.parent for path in logs.glob(f"*/{EVENTS}")), None), "a log")

    def wait(self, found: Callable[[], T | None], what: str, within_s: float = 40) -> T:
        """The first answer that is true; fails when there is none in time, and when the run has ended without."""

        def found_or_ended() -> T | None:
            ended = self._command.process.poll() is not None
            answer = found()
            if ended and not answer:
                raise AssertionError(f"{what}: the run has ended: {self._command.process.communicate()}")
            return answer

        return until(found_or_ended, within_s, what)

    def events(self, kind: str, **facts: Any) -> list[dict[str, Any]]:
        """Events of a kind with these facts, oldest first."""
        wanted = {"kind": kind, **facts}
        return [event for event in read_events(self.run_dir) if wanted.items() <= event.items()]

    def wait_for(self, kind: str, **facts: Any) -> dict[str, Any]:
        """The first event of a kind with these facts."""
        return self.wait(lambda: self.events(kind, **facts), f"event {kind} {facts}")[0]

    def rows(self, **values: int) -> list[dict[str, Any]]:
        """Rows of the table `rounds` with these values."""
        table = read_table(self.run_dir, "rounds")
        for name, value in values.items():
            table = table.filter(pc.equal(table[name], value))
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
