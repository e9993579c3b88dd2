"""The run that is kept in the repository: docs/logs.md walks through it, so it must open and stay as it is."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from pathlib import Path

import pytest

from testbed.config import load_run_file
from testbed.runlog.catalog import State, describe_run, find_run, list_runs, read_results
from testbed.runlog.compare import compare_runs
from testbed.runlog.reader import read_events, read_manifest, read_parquet, read_table
from testbed.runlog.replay_inputs import read_log
from testbed.runlog.replay_validation import validate
from testbed.runlog.schema import CONFIG, EVENTS, MANIFEST
from testbed.runlog.show import show_run

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "logs" / "sample"
MOST_BYTES = 1_000_000
POLICIES = ["topk", "topk optimal/block", "wlr θ=0.2", "joint budget=0.04"]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A copy under its name, in a folder of runs."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "logs" / "sample"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_sample_is_small_finished_and_valid() -> None:
    run = describe_run(SAMPLE)
    assert (run.state, run.problem, run.kind) == (State.FINISHED, None, "run")
    assert run.size_bytes < MOST_BYTES
    assert [policy.policy for policy in run.policies] == POLICIES
    assert all(policy.valid for policy in run.policies)
    assert run.emulated_devices == len(run.devices) == 8


def test_the_sample_was_made_from_the_run_file_in_examples() -> None:
    assert load_run_file(SAMPLE / CONFIG) == load_run_file(REPOSITORY / "examples" / "sample.toml")


def test_the_sample_names_neither_the_machine_it_ran_on_nor_a_path_of_it() -> None:
    environment = read_manifest(SAMPLE)["environment"]
    assert environment["host"] == "sample"
    for name in (MANIFEST, EVENTS, "results.json", "summary.json"):
        assert not re.search(r'"[/~]', (SAMPLE / name).read_text(encoding="utf-8")), name


def test_the_sample_is_found_by_its_name_among_runs(sample: Path) -> None:
    logs = sample.parent
    assert find_run("sample", logs) == find_run("latest", logs) == sample
    assert [run.run for run in list_runs(logs)] == ["sample"]


def test_every_token_of_the_sample_has_its_rounds() -> None:
    rounds, tokens, events = read_table(SAMPLE, "rounds"), read_table(SAMPLE, "tokens"), read_events(SAMPLE)
    assert rounds.num_rows == 8 * len(set(rounds["round"].to_pylist()))
    assert set(tokens["round"].to_pylist()) == set(rounds["round"].to_pylist())
    assert [event["kind"] for event in events].count("scored") == 3 * len(POLICIES)
    assert [event["kind"] for event in events].count("generated") == len(POLICIES)


def test_the_samples_nodes_have_rows_of_their_own_and_told_how_they_were() -> None:
    rounds, blocks = (read_parquet(SAMPLE / f"{name}.parquet") for name in ("rounds-0000", "nodes"))
    sent = {(row["round"], row["device"]) for row in rounds.to_pylist() if row["rows"]}
    assert sent == {(row["round"], row["device"]) for row in blocks.to_pylist() if row["policy"] is not None}
    told = {event["device"] for event in read_events(SAMPLE) if event["kind"] == "telemetry"}
    assert told == set(read_manifest(SAMPLE)["devices"])


def test_what_the_sample_took_is_shown_from_its_summary_and_nothing_is_written(sample: Path) -> None:
    before = contents(sample)
    shown = show_run(sample, None, read_results(sample), exact=False)
    assert (shown.emulated, shown.invalid) == (True, False)
    assert [policy.policy for policy in shown.policies] == POLICIES
    for policy in shown.policies:
        bottlenecks = sum(node.bottleneck for node in policy.nodes)
        assert bottlenecks == sum(times.count for times in policy.phases if times.phase == "whole round")
    assert contents(sample) == before


def test_the_samples_policies_compare_prompt_by_prompt() -> None:
    compared = compare_runs([SAMPLE], [])
    kept = read_results(SAMPLE)
    assert kept is not None
    for one, row in zip(compared, kept["rows"], strict=True):
        assert one.prompts == 4
        assert one.prefill.cut == pytest.approx(row["prefill_cut"])
        assert math.isfinite(one.decode.cut)
    assert compared[1].perplexity == compared[0].perplexity  # the same experts, another split of the band


def test_the_sample_answers_sql() -> None:
    pytest.importorskip("duckdb")
    from testbed.runlog.query import LogDatabase

    with LogDatabase([describe_run(SAMPLE)]) as database:
        answer = database.ask("SELECT device_name, sum(rows) AS pairs FROM rounds WHERE policy = 0 GROUP BY ALL")
        rows = dict(answer.rows)
    table = read_table(SAMPLE, "rounds").to_pylist()
    assert sum(rows.values()) == sum(row["rows"] for row in table if row["policy"] == 0)
    assert len(rows) == 8


def test_replaying_the_sample_reproduces_and_predicts_it() -> None:
    validation = validate(read_log(SAMPLE))
    assert validation.reproduces
    assert validation.predicts
    assert {row.policy for row in validation.predicted if row.claimed} == set(POLICIES[1:])
