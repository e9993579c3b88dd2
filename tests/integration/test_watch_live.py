"""`testbed watch` as a process of its own, beside a run that is still recorded."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import TESTBED, Command, started
from reported_runs import write_run

pytest.importorskip("prometheus_client")


def page_at(address: str) -> str:
    url = urlsplit(address)
    with closing(HTTPConnection(url.netloc, timeout=10)) as connection:
        connection.request("GET", url.path)
        return connection.getresponse().read().decode()


@contextmanager
def watched(folder: Path, *options: str) -> Iterator[tuple[Command, ExitStack, Path]]:
    """A run under way, and who watches it; the run ends with the stack."""
    with ExitStack() as run:
        run_dir = write_run(folder / "logs", closed=False, keep_open=run)
        with started([TESTBED, "watch", run_dir.name, "--every", "0.1", *options], folder) as command:
            yield command, run, run_dir


def test_it_follows_a_run_and_ends_with_it(tmp_path: Path) -> None:
    with watched(tmp_path, "--json") as (command, run, run_dir):
        assert command.process.stdout is not None
        first = json.loads(command.process.stdout.readline())
        assert (first["run"], first["state"]) == (run_dir.name, "running")
        run.close()
        done = command.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "finished"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_cleanly_and_leaves_the_run_alone(tmp_path: Path, how: signal.Signals) -> None:
    with watched(tmp_path) as (command, _, run_dir):
        assert command.process.stdout is not None
        assert command.process.stdout.readline().startswith(f"{run_dir.name} running: prompts 6 of 6")
        command.process.send_signal(how)
        done = command.finish()
        command.wait_until_nothing_runs()
        assert (done.returncode, done.stderr) == (0, "")
        assert list(run_dir.glob("*.seg")), "still recorded"


def test_prometheus_scrapes_a_run_under_way(tmp_path: Path) -> None:
    with watched(tmp_path, "--prometheus", "0", "--json") as (command, run, _):
        assert command.process.stdout is not None
        assert command.process.stderr is not None
        address = command.process.stderr.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        command.process.stdout.readline()
        page = page_at(address)
        run.close()
        assert command.finish().returncode == 0
    assert "wdmoe_run_active 1.0" in page
    assert 'wdmoe_rounds_total{policy="topk"} 12.0' in page
