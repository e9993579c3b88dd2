"""What nodes saw of replies that got lost, in real runs: it is on their disks, and `testbed logs collect` says so."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import pyarrow.parquet as pq
from processes import TESTBED, Command, Log, run, run_file, started, until

from testbed.runlog.node_rows import read_node_rows
from testbed.runlog.reader import read_table
from testbed.runlog.schema import NODES, Reply, Status

pytestmark = [pytest.mark.torch]

WORK = """
[workload]
score_prompts = {prompts}
score_tokens = 16
generate_prompts = 0

[timeouts]
reply_s = {reply_s}
"""
SLOW = "emulated_flops_per_s = 2.5e8"  # about 9 ms per row of the demo model, stretched five times


def collect(folder: Path, run_dir: Path) -> dict[str, dict[str, Any]]:
    """What `testbed logs collect` says of each node."""
    done = run([TESTBED, "logs", "collect", str(run_dir), "--json"], folder)
    assert (done.returncode, done.stderr) == (0, "")
    return {account["node"]: account for account in json.loads(done.stdout.splitlines()[-1])["nodes"]}


def of_node(rows: list[dict[str, Any]]) -> set[tuple[int, ...]]:
    """What both sides say of the same blocks."""
    names = ("round", "device", "rows", "node_received_ns", "node_sent_ns", "node_compute_ns", "node_boot")
    return {tuple(row[name] for name in names) for row in rows}


def test_replies_past_the_deadline_are_in_the_rows_of_their_node_when_the_run_has_ended(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=3, reply_s=0.06), devices=["", SLOW])
    done = run([TESTBED, "run", str(file), "--json"], tmp_path)
    assert done.returncode == 0
    run_dir = Path(json.loads(done.stdout.splitlines()[-1])["directory"])
    nodes = pq.read_table(run_dir / f"{NODES}.parquet").to_pylist()
    assert not list(run_dir.rglob("*.seg"))
    rounds = [row for row in read_table(run_dir, "rounds").to_pylist() if row["rows"]]
    answered = [row for row in rounds if row["status"] == Status.ANSWERED]
    assert of_node(answered) <= of_node(nodes)
    late = {row["round"] for row in rounds if row["device"] == 1 and row["status"] == Status.LATE}
    served_in_vain = {row["round"] for row in nodes if row["device"] == 1} & late
    slow = collect(tmp_path, run_dir)["jetson-1"]
    assert slow["late"] == len(served_in_vain) > 0
    assert slow["in_node_ms_p50"] is not None
    assert slow["late"] + slow["only_bs"] >= len(late)


def stop_before_a_reply_is_read(command: Command, log: Log, name: str) -> None:
    """Stop the base station while a node still works for it, and wait until that node has served in vain."""
    recorded = log.run_dir / NODES / name

    def newest_at_node() -> int:
        rows = [read_node_rows(path).records for path in recorded.glob("*.seg")]
        return max(int(row["round"][row["round"] < 2**61].max(initial=0)) for row in rows if len(row))

    def newest_logged() -> int:
        return max(int(row["round"]) for row in log.rows())

    for _ in range(20):
        command.process.send_signal(signal.SIGSTOP)
        with suppress(AssertionError):
            until(lambda: newest_at_node() > newest_logged(), 1.0, "a block served in vain")
            return
        command.process.send_signal(signal.SIGCONT)
        log.wait_for("scored", prompt=len(log.events("scored")))
    raise AssertionError("the base station was stopped 20 times and no node ever worked for it")


def test_rows_of_nodes_outlive_a_base_station_that_is_killed_before_it_read_their_replies(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=40, reply_s=30), devices=[SLOW, SLOW])
    with started([TESTBED, "run", str(file)], tmp_path) as command:
        log = Log(command, tmp_path / "logs")
        log.wait_for("scored", prompt=0)
        stop_before_a_reply_is_read(command, log, "jetson-1")
        command.process.kill()
        command.wait_until_nothing_runs()
    assert run([TESTBED, "logs", "recover", str(log.run_dir)], tmp_path).returncode == 0
    accounts = collect(tmp_path, log.run_dir)
    nodes = pq.read_table(log.run_dir / f"{NODES}.parquet").to_pylist()
    answered = log.rows(status=Status.ANSWERED)
    assert of_node(answered) <= of_node(nodes)
    assert sum(account["used"] for account in accounts.values()) == len(answered)
    assert accounts["jetson-1"]["only_node"] > 0
    newest = max((row for row in nodes if row["device"] == 1), key=lambda row: row["node_received_ns"])
    assert newest["round"] > max(row["round"] for row in answered)
    assert newest["policy"] is None
    assert newest["reply"] in (Reply.SENT, Reply.COMPUTED)
