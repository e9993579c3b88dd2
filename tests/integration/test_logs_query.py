"""`testbed logs query` and `export` on logs written by hand, by DuckDB itself."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from testbed.cli import main
from testbed.errors import ConfigError, RunLogError
from testbed.runlog.catalog import describe_run
from testbed.runlog.columns import ROUND_COLUMNS, columns_of
from testbed.runlog.manifest import write_manifest
from testbed.runlog.query import LogDatabase
from testbed.runlog.reader import read_table
from testbed.runlog.recorder import Recorder

DEVICES = ["a", "b"]
NEW_COLUMNS = ["dilation", "bandwidth_hz", "asked_down_bits_per_s"]


def record(recorder: Recorder, top_k: int, rounds: int) -> None:
    shape = (3, top_k)
    for number in range(rounds):
        rounds_N = {
            "round": number, "policy": number % 2, "prompt": 0, "layer": 0, "phase": 0, "attempt": 0, "dilation": 2.0,
            "rows": [2, 4], "experts_touched": 1, "bytes_down": 10, "bytes_up": 10, "parts_down": 1, "parts_up": 1,
            "status": [1, 3], "state_available": True, "round_ns": 8_000_000, "rtt_ns": [4_000_000, -1],
        }  # fmt: skip
        tokens_TK = {
            name: np.full(shape, value)
            for name, value in {
                "expert": 1,
                "weight": 0.5,
                "asked": 1,
                "kept": True,
                "device": 1,
                "final_weight": 1,
            }.items()
        }
        recorder.record_round(rounds_N, {**tokens_TK, "orphaned": False})


def run_left(logs: Path, name: str, top_k: int = 2, rounds: int = 4, *, is_killed: bool = False) -> Path:
    """A run of two policies with a sampled board; a killed one is a copy of a live one."""
    run_dir = logs / name
    run_dir.mkdir(parents=True)
    manifest = {"config": {}, "policies": ["topk", "it's wlr"], "devices": DEVICES, "links": "loopback, as they are"}
    write_manifest(run_dir, manifest)
    with Recorder(run_dir, name, DEVICES, top_k=top_k, experts=0) as recorder:
        record(recorder, top_k, rounds)
        recorder.event("power_rail", device="a", rail="VDD_IN")
        recorder.event("power", device="a", power_w=7.5, sampled_ns=5)
        host = {"sampled_ns": 6, "figures": {"cpu_mhz": 1344.0, "load_1m": 0.5}}
        board = {"sampled_ns": 4, "figures": {"cpu_c": 46.1, "cv0_c": None}}
        recorder.event("telemetry", device="b", samples=[host, board])
        recorder.event("node_lost", device="b", how="disconnected")
        recorder.event("scored", policy=1, prompt=0, nats=2.5)
        if is_killed:
            shutil.copytree(run_dir, logs / "copy")
    if is_killed:
        shutil.rmtree(run_dir)
        (logs / "copy").rename(run_dir)
    return run_dir


def make_old(run_dir: Path) -> None:
    """As a run was before some columns were."""
    path = run_dir / "rounds-0000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(NEW_COLUMNS), path)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """An older run, one with other K, one that was killed."""
    folder = tmp_path / "it's logs"
    make_old(run_left(folder, "20250301-120000-old"))
    run_left(folder, "20250301-130000-wide", top_k=3)
    run_left(folder, "20250301-140000-killed", is_killed=True)
    return folder


def ask(logs: Path, sql: str, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["logs", "query", sql, "--logs", str(logs), "--json", *options]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows: list[dict[str, Any]] = document["rows"]
    assert all(list(row) == document["columns"] for row in rows)
    return rows


def test_rows_of_all_runs_stand_in_one_table_sealed_or_not_old_or_new(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ask(logs, "SELECT run, count(*) AS n, min(dilation) AS d FROM rounds GROUP BY run ORDER BY run", capsys)
    assert [(row["run"][16:], row["n"], row["d"]) for row in rows] == [("old", 8, 1), ("wide", 8, 2), ("killed", 8, 2)]
    rows = ask(logs, "SELECT run, len(expert) AS k, count(*) AS n FROM tokens GROUP BY ALL ORDER BY run", capsys)
    assert [(row["k"], row["n"]) for row in rows] == [(2, 12), (3, 12), (2, 12)]


def test_numbers_are_given_their_names_and_unknown_is_null(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT DISTINCT policy_name, device_name, rtt_ns, bandwidth_hz FROM rounds ORDER BY ALL"
    rows = [tuple(row.values()) for row in ask(logs, sql, capsys, "--run", "wide")]
    assert rows == [
        ("it's wlr", "a", 4_000_000, None), ("it's wlr", "b", None, None),
        ("topk", "a", 4_000_000, None), ("topk", "b", None, None),
    ]  # fmt: skip


def test_an_answer_is_what_the_rows_themselves_say(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = read_table(logs / "20250301-130000-wide", "rounds")
    sql = "SELECT sum(rows) AS s, avg(round_ns / dilation) AS mean, count(rtt_ns) AS answered FROM rounds"
    (row,) = ask(logs, sql, capsys, "--run", "wide")
    assert row == {"s": sum(rounds["rows"].to_pylist()), "mean": 4e6, "answered": 4}


def test_every_column_of_the_schema_is_there_even_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [row["column_name"] for row in ask(tmp_path, "DESCRIBE rounds", capsys)]
    assert rounds == ["run", "policy_name", "device_name", *(column.name for column in ROUND_COLUMNS)]
    tokens = [row["column_name"] for row in ask(tmp_path, "DESCRIBE tokens", capsys)]
    assert tokens == ["run", "policy_name", *(column.name for column in columns_of("tokens", 1))]
    assert ask(tmp_path, "SELECT * FROM telemetry", capsys) == []
    names = {row["name"] for row in ask(tmp_path, "SHOW TABLES", capsys)}
    assert names == {"runs", "rounds", "tokens", "nodes", "events", "telemetry"}


def test_types_are_the_same_with_and_without_rows(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for table in ("rounds", "tokens"):
        assert ask(logs, f"DESCRIBE {table}", capsys) == ask(tmp_path, f"DESCRIBE {table}", capsys)


def test_events_telemetry_and_runs_can_be_joined(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT kind, device_name, policy_name, facts->>'nats' AS nats FROM events"
    assert ask(logs, f"{sql} WHERE kind IN ('node_lost', 'scored')", capsys, "--run", "killed") == [
        {"kind": "node_lost", "device_name": "b", "policy_name": None, "nats": None},
        {"kind": "scored", "device_name": None, "policy_name": "it's wlr", "nats": "2.5"},
    ]
    sql = "SELECT state, value, rail, sampled_ns FROM telemetry JOIN runs USING (run) WHERE run LIKE '%killed'"
    power = [{"state": "aborted", "value": 7.5, "rail": "VDD_IN", "sampled_ns": 5}]
    assert ask(logs, f"{sql} AND figure = 'power_w'", capsys) == power
    (run,) = ask(logs, "SELECT began, devices, perplexity FROM runs WHERE run LIKE '%old'", capsys)
    assert run == {"began": "2025-03-01 12:00:00", "devices": DEVICES, "perplexity": [None, None]}


def test_telemetry_has_a_row_per_sample_and_figure_with_its_unit(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = "SELECT device_name, sampled_ns, figure, unit, value FROM telemetry ORDER BY ALL"
    assert [tuple(row.values()) for row in ask(logs, sql, capsys, "--run", "killed")] == [
        ("a", 5, "power_w", "W", 7.5),
        ("b", 4, "cpu_c", "°C", 46.1),
        ("b", 4, "cv0_c", "°C", None),
        ("b", 6, "cpu_mhz", "MHz", 1344.0),
        ("b", 6, "load_1m", "", 0.5),
    ]


def test_a_run_with_a_damaged_manifest_is_left_out_and_named(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "20250301-130000-wide" / "manifest.json").write_text("{")
    assert main(["logs", "query", "SELECT count(DISTINCT run) AS n FROM rounds", "--logs", str(logs), "--csv"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "n\n2\n"
    assert "left out: " in shown.err
    assert "wide" in shown.err


@pytest.mark.parametrize(
    "sql",
    [
        "COPY runs TO 'stolen.csv'",
        "CREATE TABLE t AS SELECT 1",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "ATTACH 'other.duckdb'",
        "SELECT 1; SELECT 2",
        "",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('https://example.org/x.csv')",
        "SELECT * FROM glob('/*')",
        "SELECT nothing FROM rounds",
        "SELEC 1",
        "SELECT CAST(kind AS INTEGER) FROM events",
        "SELECT 1 AS a, 2 AS a",
    ],
)
def test_only_the_logs_are_read_and_what_cannot_be_answered_is_one_line(
    logs: Path, tmp_path: Path, sql: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["logs", "query", sql.format(secret=secret), "--logs", str(logs), "--json"]
    assert main(arguments) == RunLogError.exit_code
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert shown.err.startswith("error: query: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_for_people_ends_where_it_is_told(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT round, rtt_ns FROM rounds ORDER BY ALL"
    assert main(["logs", "query", sql, "--logs", str(logs), "--rows", "5"]) == 0
    shown = capsys.readouterr()
    assert len([line for line in shown.out.splitlines() if line.strip().startswith("0")]) == 5
    assert "the first 5 rows" in shown.err
    assert main(["logs", "query", "SELECT NULL AS x, [1.5, NULL] AS y, true AS z", "--logs", str(logs), "--csv"]) == 0
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [["x", "y", "z"], ["", "[1.5, null]", "true"]]
    assert main(["logs", "query", sql, "--logs", str(logs), "--csv", "--json"]) == ConfigError.exit_code


def exported(logs: Path, out: Path, *options: str) -> int:
    return main(["logs", "export", "killed", "--logs", str(logs), "--out", str(out), *options])


def test_an_exported_parquet_file_holds_the_run_s_rows(logs: Path, tmp_path: Path) -> None:
    out = tmp_path / "rounds.parquet"
    assert exported(logs, out, "--format", "parquet") == 0
    rows = read_table(logs / "20250301-140000-killed", "rounds")
    copied = pq.read_table(out)
    assert copied.column_names == ["run", "policy_name", "device_name", *rows.column_names]
    assert copied.select(rows.column_names).equals(rows.replace_schema_metadata())
    assert pa.types.is_string(copied.schema.field("device_name").type)


def test_csv_and_json_hold_them_too_and_unknown_is_empty_or_null(logs: Path, tmp_path: Path) -> None:
    assert exported(logs, tmp_path / "rounds.csv") == 0
    with (tmp_path / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["device_name"], row["rtt_ns"]) for row in rows[:2]] == [("a", "4000000"), ("b", "")]
    assert exported(logs, tmp_path / "tokens.json", "--table", "tokens", "--format", "json") == 0
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert (len(tokens), tokens[0]["expert"], tokens[0]["kept"]) == (12, [1, 1], [True, True])


@pytest.mark.parametrize("table", ["rounds", "tokens", "events", "telemetry", "runs"])
def test_every_table_can_be_exported_and_says_how_many_rows(
    logs: Path, tmp_path: Path, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(logs, tmp_path / "out.json", "--table", table, "--format", "json", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["state"], told["rows"]) == ("aborted", len(json.loads((tmp_path / "out.json").read_text())))


def test_a_file_is_never_replaced_without_force_and_a_failed_export_leaves_none(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.csv"
    out.write_text("mine")
    assert exported(logs, out) == ConfigError.exit_code
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert exported(logs, out, "--force") == 0
    assert exported(logs, tmp_path / "none" / "x.csv") == ConfigError.exit_code
    (logs / "20250301-140000-killed" / "rounds-0000.seg").write_bytes(b"damaged")
    assert exported(logs, tmp_path / "new.csv") == RunLogError.exit_code
    assert {path.name for path in tmp_path.iterdir()} == {"it's logs", "mine.csv"}


def test_a_database_is_asked_for_what_is_mentioned_only(logs: Path) -> None:
    for run_dir in logs.iterdir():
        (run_dir / "events.jsonl").write_text("damaged\n")
    with LogDatabase([describe_run(run_dir) for run_dir in logs.iterdir()]) as database:
        assert list(database.ask("SELECT count(*) FROM rounds").rows) == [(24,)]
    with (
        LogDatabase([describe_run(logs / "20250301-120000-old")]) as database,
        pytest.raises(RunLogError, match="JSON"),
    ):
        database.ask("SELECT * FROM events")
