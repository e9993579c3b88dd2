"""A log of an older schema opens everywhere; one of a newer schema is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from testbed.cli import main
from testbed.errors import RunLogError
from testbed.runlog import schema
from testbed.runlog.columns import ROUND_COLUMNS, record_dtype, token_columns
from testbed.runlog.manifest import write_manifest
from testbed.runlog.reader import losses, read_table
from testbed.runlog.schema import SCHEMA_VERSION
from testbed.runlog.segment import Segment

# What schema 1 of the first runs did not have.
LATER = {"dilation", "node_padding_ns", "clock_offset_s", "clock_bound_ns", "asked", "state_age_s", "bandwidth_hz"}
LATER |= {f"{kind}_{way}_bits_per_s" for kind in ("asked", "measured") for way in ("down", "up")}
ROUNDS = 6


def older_run(run_dir: Path, version: int = 1) -> Path:
    """Segments as the first program left them when it was killed: fewer columns, no count of lost rows."""
    run_dir.mkdir(parents=True)
    for table, columns in (("rounds", ROUND_COLUMNS), ("tokens", token_columns())):
        kept = tuple(column for column in columns if column.name not in LATER)
        dtype = record_dtype(kept, top_k=2, experts=2)
        segment = Segment(run_dir / f"{table}-0000.seg", {"schema": version, "run_id": "old"}, dtype, capacity=8)
        for column in kept:
            segment.columns[column.name][:ROUNDS] = column.missing if column.nullable else 0
        segment.columns["round"][:ROUNDS] = np.arange(ROUNDS)
        if table == "rounds":
            segment.columns["round_ns"][:ROUNDS] = 1_000_000
        segment.commit(ROUNDS)
    (run_dir / "events.jsonl").touch()
    manifest = {"config": {}, "policies": ["vanilla"], "devices": ["a"], "links": "loopback", "emulated": {}}
    write_manifest(run_dir, manifest)
    return run_dir


def test_an_older_run_that_was_killed_is_read_recovered_shown_and_queried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = older_run(tmp_path / "20250101-000000-old")
    live = read_table(run_dir, "rounds")
    assert live["round"].to_pylist() == list(range(ROUNDS))
    assert losses(run_dir, "rounds").full_disk is None, "not counted then: unknown, not 0"
    assert main(["logs", "recover", run_dir.name, "--logs", str(tmp_path), "--json"]) == 0
    (recovered,) = json.loads(capsys.readouterr().out)["recovered"]
    assert recovered == {
        "run": run_dir.name,
        "rounds": ROUNDS,
        "tokens": ROUNDS,
        "lost": None,
        "missing": 0,
        "damaged": [],
    }
    assert read_table(run_dir, "rounds").equals(live)
    assert losses(run_dir, "rounds").full_disk is None
    assert main(["logs", "show", run_dir.name, "--logs", str(tmp_path)]) == 0
    assert "vanilla" in capsys.readouterr().out


def test_an_older_run_is_queried_with_null_for_what_it_did_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("duckdb")
    older_run(tmp_path / "20250101-000000-old")
    sql = "SELECT count(*) AS rows, count(clock_bound_ns) AS bounds FROM rounds"
    assert main(["logs", "query", sql, "--logs", str(tmp_path), "--json"]) == 0
    assert f'{{"rows": {ROUNDS}, "bounds": 0}}' in capsys.readouterr().out


@pytest.mark.parametrize("sealed", [False, True])
def test_a_run_of_a_newer_schema_is_refused_in_one_line_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sealed: bool
) -> None:
    run_dir = older_run(tmp_path / "20990101-000000-new", SCHEMA_VERSION + 1)
    if sealed:
        with monkeypatch.context() as then:
            then.setattr("testbed.runlog.segment_header.SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
            assert main(["logs", "recover", run_dir.name, "--logs", str(tmp_path)]) == 0
        assert pq.read_schema(run_dir / "rounds-0000.parquet").names
    before = sorted((path.name, path.stat().st_size) for path in run_dir.iterdir())
    with pytest.raises(RunLogError, match=f"schema {SCHEMA_VERSION + 1}.*update the testbed"):
        read_table(run_dir, "rounds")
    capsys.readouterr()
    if not sealed:
        assert main(["logs", "recover", run_dir.name, "--logs", str(tmp_path)]) == RunLogError.exit_code
        assert main(["logs", "show", run_dir.name, "--logs", str(tmp_path)]) == RunLogError.exit_code
        assert all("update the testbed" in line for line in capsys.readouterr().err.splitlines())
    assert sorted((path.name, path.stat().st_size) for path in run_dir.iterdir()) == before
