"""Runs on the boards of a rack: their run file, and what is seen of one that goes on."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from processes import until

from testbed.runlog.reader import read_events, read_table
from testbed.runlog.schema import Status
from testbed.watch.tally import PRESENT_AFTER

WITHIN_S = 300.0
PATIENT_S, ALERT_S = 60.0, 3.0  # before a node is lost: where nothing is to fail, and where something is
RUN_FILE = """
name = "rack"
[workload]
score_prompts = 3
score_tokens = 32
generate_prompts = {generated}
new_tokens = 400
[fleet]
keys = "{keys}"
[timeouts]
join_s = 120.0
reply_s = {patience_s}
silence_s = {patience_s}
[on_loss]
invalid_above = 1.0
[[device]]
name = "taken-from-the-inventory"
[[policy]]
name = "topk"
[[policy]]
name = "wlr"
theta = 0.2
"""


def write_run_file(folder: Path, *, generated: int, patience_s: float = PATIENT_S) -> Path:
    run_file = folder / f"rack-{generated}.toml"
    run_file.write_text(RUN_FILE.format(keys=folder / "keys", generated=generated, patience_s=patience_s))
    return run_file


class LiveRun(NamedTuple):
    """A run that goes on; whatever is waited for, it fails where the run ends."""

    process: subprocess.Popen[str]
    folder: Path

    def wait_for(self, found: Callable[[], Any], what: str) -> None:
        def found_while_it_runs() -> Any:
            assert self.process.poll() is None, self.process.communicate()
            return found()

        until(found_while_it_runs, WITHIN_S, what)

    def has(self, device: str) -> bool:
        """Whether a device is taken for present, by what was last said of that."""
        said = [PRESENT_AFTER.get(event["kind"]) for event in read_events(self.folder) if event.get("device") == device]
        return next((present for present in reversed(said) if present is not None), False)

    def answered(self, device: int) -> int:
        """How many blocks a device has answered."""
        rows = read_table(self.folder, "rounds").select(["device", "status"]).to_pydict()
        pairs = zip(rows["device"], rows["status"], strict=True)
        return sum(pair == (device, Status.ANSWERED) for pair in pairs)


@contextmanager
def run_under_way(process: subprocess.Popen[str], out: Path) -> Iterator[LiveRun]:
    """A run that has scored its first prompt; it is ended as by Ctrl-C."""

    def begun() -> Path | None:
        assert process.poll() is None, process.communicate()
        return next((path.parent for path in out.glob("*/events.jsonl") if '"scored"' in path.read_text()), None)

    try:
        yield LiveRun(process, until(begun, WITHIN_S, "a prompt scored"))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
