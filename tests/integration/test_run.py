"""`testbed run` as a user types it: its table, its log, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, Command, Log, run_file, started

from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import CONFIG, EVENTS, MANIFEST
from testbed.runlog.seal import seal_run

pytestmark = [pytest.mark.torch]

SMALL = """
[workload]
score_prompts = 2
score_tokens = 32
generate_prompts = 1
prompt_tokens = 8
new_tokens = 4
"""
LONG = """
[workload]
score_prompts = 40
score_tokens = 16
generate_prompts = 0
"""
SLOW = "emulated_flops_per_s = 2.5e8"  # about 9 ms per row of the demo model, stretched five times
WLR = 'name = "wlr"\ntheta = 0.2'
LAYERS, DEVICES = 4, 8
KEYS_OF_A_ROW = {
    *("policy", "params", "prefill_block_p50_s", "prefill_cut", "decode_token_p50_s", "perplexity", "accuracy"),
    *("kept_fraction", "dropped_mass", "lost", "orphaned"),
}


def keys_left(command: Command, run_dir: Path) -> list[Path]:
    return [p for folder in (command.runtime, run_dir) for p in folder.rglob("*") if p.suffix in (".key", ".pub")]


def test_a_run_prints_its_document_keeps_its_log_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = run_file(tmp_path, SMALL, policies=['name = "topk"', WLR])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        done = command.finish(90)
        command.wait_until_nothing_runs()
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout.splitlines()[-1])
        run_dir = tmp_path / "logs" / document["run"]
        assert keys_left(command, run_dir) == []
    assert_rows_are_right(document["rows"])
    assert_log_is_complete(run_dir, file)


def assert_rows_are_right(rows: list[dict[str, Any]]) -> None:
    assert all(row.keys() >= KEYS_OF_A_ROW for row in rows)
    topk, wlr = rows
    assert (topk["policy"], topk["params"]) == ("topk", {})
    assert (topk["kept_fraction"], topk["dropped_mass"], topk["prefill_cut"]) == (1, 0, 0)
    assert (wlr["policy"], wlr["params"]) == ("wlr", {"theta": 0.2})
    for row in rows:
        assert (row["late"], row["lost"], row["orphaned"], row["valid"]) == (0, 0, 0, True)
        assert 0 < row["prefill_block_p50_s"] <= row["prefill_block_p95_s"]
        assert 0 < row["decode_rounds_p50_s"] < row["decode_token_p50_s"]
        assert 1 < row["perplexity"] < 2048, "better than guessing one of the 2048 tokens"
        assert 0 < row["accuracy"] < 1


def assert_log_is_complete(run_dir: Path, file: Path) -> None:
    rounds, tokens = read_table(run_dir, "rounds"), read_table(run_dir, "tokens")
    manifest = read_manifest(run_dir)
    names = {path.name for path in run_dir.iterdir()}
    summed_up = {"summary.json", "summary.npz", "results.json"}
    sealed = {"rounds-0000.parquet", "tokens-0000.parquet", "nodes.parquet"}
    assert names == {MANIFEST, CONFIG, EVENTS, "nodes", *sealed, *summed_up}
    assert (run_dir / CONFIG).read_text() == file.read_text()
    assert len(manifest["text_sha256"]) == 64
    assert len(manifest["devices"]) == DEVICES
    assert manifest["encryption"].startswith("CURVE")
    prefill, decode = 2 + 1, 4 - 1  # blocks per layer and policy: the first new token comes out of the prefill
    assert rounds.num_rows == 2 * (prefill + decode) * LAYERS * DEVICES
    assert tokens.num_rows == 2 * (2 * 32 + 8 + decode) * LAYERS
    assert {path.read_text() for path in (run_dir / "nodes").iterdir()} == {""}
    kinds = {event["kind"] for event in read_events(run_dir)}
    kinds.discard("telemetry")  # one a second: none in a quick run
    assert kinds == {"node_joined", "all_joined", "scored", "generated"}, "leaving at the end is no loss"


def test_ctrl_c_ends_a_run_with_one_line_and_a_sealed_log(tmp_path: Path) -> None:
    file = run_file(tmp_path, LONG, devices=[SLOW] * DEVICES)
    with started([TESTBED, "run", str(file)], tmp_path) as command:
        log = Log(command, tmp_path / "logs")
        log.wait_for("scored", prompt=1)
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does it: to the nodes too
        done = command.finish(within_s=8)
        command.wait_until_nothing_runs()
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
        assert keys_left(command, log.run_dir) == []
    assert not list(log.run_dir.glob("*.seg*"))
    assert len(log.rows()) >= 2 * LAYERS * DEVICES


def test_the_nodes_of_a_killed_run_end_by_themselves_and_its_log_can_be_sealed(tmp_path: Path) -> None:
    file = run_file(tmp_path, LONG, devices=[SLOW] * DEVICES)
    with started([TESTBED, "run", str(file)], tmp_path) as command:
        log = Log(command, tmp_path / "logs")
        log.wait_for("scored", prompt=1)
        command.process.kill()
        command.wait_until_nothing_runs(within_s=8)
        assert command.finish().returncode == -signal.SIGKILL
    recorded = len(log.rows())
    assert recorded >= 2 * LAYERS * DEVICES
    seal_run(log.run_dir)
    assert len(log.rows()) == recorded
