"""Nodes die, hang and come back while a run is under way: it ends, it says what it lost, it uses them again."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, Command, Log, run_file, started, until
from rack import rack
from splits import DEVICES, write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.runlog.schema import Status

pytestmark = [pytest.mark.torch]

# fp32, so that one row is more bytes than all of ZeroMQ's pings to a node that does not read them.
WORK = """
[wire]
down = "fp32"

[workload]
score_prompts = {prompts}
score_tokens = 16
generate_prompts = 0

[on_loss]
orphaned = "{orphaned}"
"""
FAST, SLOW = "", "emulated_flops_per_s = 2.5e8"  # about 9 ms per row of the demo model, stretched five times
UNREAD_BYTES = 700
VICTIM, VICTIM_NAME = 1, "jetson-1"


def begin(command: Command, tmp_path: Path) -> Log:
    """The log of a run that has scored its first prompt."""
    log = Log(command, tmp_path / "logs")
    log.wait_for("scored", prompt=0)
    return log


def unread_bytes(ports: set[int]) -> int:
    """What the kernel holds for connections from these local ports and nobody has read."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].split(":")[1], 16) for line in lines if int(line[1].split(":")[1], 16) in ports)


def stop_with_work(process: psutil.Process) -> None:
    """Stop a node when there is a block for it that it has not read, so that a round certainly waits for it.

    One that was just computing has read its block: it goes on and is stopped again, before anyone takes it for lost.
    """
    ports = {connection.laddr.port for connection in process.net_connections("tcp")}
    for _ in range(20):
        process.send_signal(signal.SIGSTOP)
        with suppress(AssertionError):
            until(lambda: unread_bytes(ports) > UNREAD_BYTES, 0.7, "a block for the stopped node")
            return
        process.send_signal(signal.SIGCONT)
    raise AssertionError("a node was stopped 20 times and no block ever waited for it")


def document_of(command: Command) -> dict[str, Any]:
    """What the run prints at its end, which is a good one."""
    done = command.finish()
    command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def answered_after(log: Log, event: dict[str, Any]) -> list[dict[str, Any]]:
    """The victim's rows whose reply was read after an event; both are on the base station's clock."""
    rows = log.rows(device=VICTIM, status=Status.ANSWERED)
    return [row for row in rows if row["bs_received_ns"] > event["monotonic_ns"]]


def test_a_run_survives_the_kill_of_a_node_counts_the_loss_and_uses_the_node_again(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=14, orphaned="zero"), devices=[SLOW, FAST, SLOW, SLOW])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        log = begin(command, tmp_path)
        victim = command.node(log.run_dir, VICTIM_NAME)
        stop_with_work(victim)
        victim.kill()
        died = log.wait_for("process_died", device=VICTIM_NAME)
        assert died["exit_code"] == -signal.SIGKILL
        (row,) = document_of(command)["rows"]
    lost = log.rows(device=VICTIM, status=Status.LOST)
    assert row["lost"] == len(lost) > 0
    assert row["kept_fraction"] < 1
    assert log.events("node_lost", device=VICTIM_NAME)
    first, second = log.events("node_joined", device=VICTIM_NAME)
    assert first["boot_id"] != second["boot_id"]
    assert {row["node_boot"] for row in answered_after(log, second)} == {second["boot_id"]}


def test_a_run_goes_on_without_a_node_that_hangs_and_uses_it_again_when_it_wakes(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=14, orphaned="zero"), devices=[SLOW, FAST, SLOW, SLOW])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        log = begin(command, tmp_path)
        victim = command.node(log.run_dir, VICTIM_NAME)
        stop_with_work(victim)
        lost = log.wait_for("node_lost", device=VICTIM_NAME)
        scored = len(log.events("scored"))
        log.wait(lambda: len(log.events("scored")) > scored + 1, "prompts scored without the node")
        victim.send_signal(signal.SIGCONT)
        (row,) = document_of(command)["rows"]
    assert row["late"] + row["lost"] > 0
    assert not log.events("process_died")
    back = [e for kind in ("node_joined", "node_heard_again") for e in log.events(kind, device=VICTIM_NAME)]
    back = [event for event in back if event["monotonic_ns"] > lost["monotonic_ns"]]
    assert answered_after(log, back[0])


def end_all_nodes(command: Command, log: Log) -> None:
    """Kill all nodes at once, as a power cut would: none is answered for by another."""
    nodes = [command.node(log.run_dir, name) for name in ("jetson-0", "jetson-1")]
    for node in nodes:
        node.send_signal(signal.SIGSTOP)
    for node in nodes:
        node.kill()


def test_a_run_without_any_node_left_ends_and_says_that_it_is_invalid(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=10, orphaned="zero"), devices=[SLOW, SLOW])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        end_all_nodes(command, begin(command, tmp_path))
        document = document_of(command)
    (row,) = document["rows"]
    assert row["orphaned"] > 0
    assert row["orphaned_fraction"] > 0.01
    assert (row["valid"], document["valid"]) == (False, False)


def test_a_run_that_may_not_orphan_tokens_fails_with_one_line_when_all_nodes_are_gone(tmp_path: Path) -> None:
    file = run_file(tmp_path, WORK.format(prompts=10, orphaned="fail"), devices=[SLOW, SLOW])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        end_all_nodes(command, begin(command, tmp_path))
        done = command.finish()
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stdout) == (7, "")
    assert len(done.stderr.splitlines()) == 1
    assert "lost all their experts" in done.stderr


def test_nodes_are_taken_back_even_when_none_is_left_to_wait_for(tmp_path: Path) -> None:
    write_split(tmp_path / "split", FfnSpec(width=8, inner=8, has_gate=True, act="silu"))
    with rack(tmp_path / "split", tmp_path, arguments=["--backend", "numpy"]) as nodes:
        dispatcher, nothing_to_send = nodes.wireless(), np.zeros((1, 8), np.float32)
        for node in nodes.fleet.nodes:
            assert node.process is not None
            node.process.kill()

        def all_back() -> bool:
            dispatcher.refresh()
            dispatcher.exchange(0, 0, nothing_to_send, [])
            return len(nodes.listening.told("node_joined")) == 2 * len(DEVICES)

        until(all_back, 30, "every node's second joining")
