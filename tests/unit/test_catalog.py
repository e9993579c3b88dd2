from __future__ import annotations

import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import RunLogError
from testbed.runlog.catalog import State, describe_run, find_run, list_runs, read_results, write_results
from testbed.runlog.events import hold
from testbed.runlog.manifest import write_manifest

WORKLOAD = {"score_prompts": 2, "generate_prompts": 1, "new_tokens": 4}


def left(logs: Path, name: str, *, prompts: int = 3, **of_manifest: Any) -> Path:
    """A run of two policies that ended after so many prompts of the second one."""
    run_dir = logs / name
    run_dir.mkdir(parents=True)
    manifest = {
        "config": {"workload": WORKLOAD}, "policies": ["topk", "wlr θ=0.2"], "devices": ["a", "b"],
        "model": {"name": "model", "type": "mixtral"}, "links": "loopback, as they are", "emulated": {},
    }  # fmt: skip
    write_manifest(run_dir, {**manifest, **of_manifest})
    kinds = ("scored", "scored", "generated")
    done = [(policy, prompt) for policy in (0, 1) for prompt in range(3)][: 3 + prompts]
    events = [
        {"realtime_ns": 10**18, "kind": kinds[prompt], "policy": policy, "prompt": prompt} for policy, prompt in done
    ]
    events += [{"realtime_ns": 10**18, "kind": "power", "device": "a"}]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def test_a_run_is_described_by_its_manifest_alone(tmp_path: Path) -> None:
    left(tmp_path, "20250301-120007-local", emulated={"a": {"row_s": 1.0}})
    (run,) = list_runs(tmp_path)
    assert (run.state, run.kind, run.summed_up) == (State.FINISHED, "run", False)
    assert run.began == datetime(2025, 3, 1, 12, 0, 7, tzinfo=timezone.utc)
    assert (run.model, run.channel, run.devices) == ("model (mixtral)", "loopback, as they are", ("a", "b"))
    assert run.compute == "emulated on 1 of 2 devices"
    assert [(policy.policy, policy.perplexity) for policy in run.policies] == [("topk", None), ("wlr θ=0.2", None)]
    assert json.loads(json.dumps(run.document()))["state"] == "finished"


def test_a_run_that_did_not_reach_its_last_prompt_was_aborted(tmp_path: Path) -> None:
    states = [describe_run(left(tmp_path, f"20250301-12000{n}-local", prompts=n)).state for n in range(4)]
    assert states == [State.ABORTED, State.ABORTED, State.ABORTED, State.FINISHED]


def test_a_run_without_a_manifest_ended_before_its_nodes_started(tmp_path: Path) -> None:
    run_dir = tmp_path / "20250301-120000-local"
    run_dir.mkdir()
    (run_dir / "events.jsonl").touch()
    (run,) = list_runs(tmp_path)
    assert (run.state, run.policies, run.model) == (State.ABORTED, (), None)


def test_segments_mean_running_while_they_are_held_and_aborted_afterwards(tmp_path: Path) -> None:
    run_dir = left(tmp_path, "20250301-120000-local")
    (run_dir / "rounds-0000.seg").touch()
    lock = hold(run_dir)
    assert describe_run(run_dir).state is State.RUNNING
    os.close(lock)
    assert describe_run(run_dir).state is State.ABORTED


def test_a_probe_is_none_of_the_aborted_runs(tmp_path: Path) -> None:
    run_dir = left(tmp_path, "20250301-120000-local", prompts=0)
    (run_dir / "probe.json").write_text("{}")
    run = describe_run(run_dir)
    assert (run.kind, run.state) == ("probe", State.FINISHED)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"devices": 3}', '{"devices": [], "policies": [1]}'])
def test_a_damaged_manifest_is_told_and_hides_no_other_run(tmp_path: Path, content: str) -> None:
    broken = left(tmp_path, "20250301-120000-local") / "manifest.json"
    broken.write_text(content)
    left(tmp_path, "20250301-120001-local")
    first, second = list_runs(tmp_path)
    assert (first.state, second.state) == (State.UNREADABLE, State.FINISHED)
    assert first.problem is not None
    assert str(broken) in first.problem
    assert "\n" not in first.problem


def test_figures_kept_beside_the_rows_are_shown_per_policy(tmp_path: Path) -> None:
    run_dir = left(tmp_path, "20250301-120000-local")
    rows = [
        {"prefill_cut": 0.0, "prefill_cut_low": math.nan, "perplexity": 9.5, "valid": True},
        {"prefill_cut": 0.4, "prefill_cut_low": 0.3, "prefill_cut_high": 0.5, "perplexity": 9.75, "valid": False},
    ]
    write_results(run_dir, {"rows": rows})
    run = describe_run(run_dir)
    topk, wlr = run.policies
    assert run.summed_up
    assert (topk.prefill_cut, topk.prefill_cut_low, topk.prefill_cut_high) == (0.0, None, None)
    assert (wlr.prefill_cut, wlr.perplexity, wlr.valid) == (0.4, 9.75, False)


def test_figures_that_are_not_whole_can_be_made_again(tmp_path: Path) -> None:
    run_dir = left(tmp_path, "20250301-120000-local")
    assert read_results(run_dir) is None
    (run_dir / "results.json").write_text('{"rows": [')
    assert read_results(run_dir) is None
    assert not describe_run(run_dir).summed_up


def test_runs_are_listed_by_the_time_they_began_and_the_sample_is_not_the_latest(tmp_path: Path) -> None:
    names = ["20250301-120000-b", "20250301-110000-c", "20250302-000000-a"]
    for name in [*names, "sample"]:
        left(tmp_path, name)
    (tmp_path / "README.md").touch()
    (tmp_path / "sweep-paper").mkdir()
    assert [run.run for run in list_runs(tmp_path)] == ["sample", names[1], names[0], names[2]]
    assert find_run("latest", tmp_path).name == names[2]


def test_a_run_is_found_by_its_name_a_part_of_it_or_a_path(tmp_path: Path) -> None:
    first, second = left(tmp_path, "20250301-120000-local"), left(tmp_path, "20250301-120001-paper")
    assert find_run(first.name, tmp_path) == first
    assert find_run("paper", tmp_path) == second
    assert find_run(str(first), tmp_path / "elsewhere") == first


def test_latest_is_one_that_began_to_run(tmp_path: Path) -> None:
    first = left(tmp_path, "20250301-120000-local")
    (tmp_path / "20250301-120001-local").mkdir()
    (tmp_path / "20250301-120001-local" / "events.jsonl").touch()
    assert find_run("latest", tmp_path) == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("20250301-120000-locl", "did you mean 20250301-120000-local"),
        ("20250301", "did you mean 20250301-120000-local, 20250301-120001-local"),
        ("nothing like it", "`latest` or a run's name"),
        ("", "`latest` or a run's name"),
    ],
)
def test_a_run_that_is_not_there_is_one_line_with_the_nearest_names(tmp_path: Path, text: str, said: str) -> None:
    for second in (0, 1):
        left(tmp_path, f"20250301-12000{second}-local")
    with pytest.raises(RunLogError) as caught:
        find_run(text, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_runs_and_one_that_is_not_there_are_told(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == []
    with pytest.raises(RunLogError, match="no runs here yet"):
        find_run("latest", tmp_path)
    with pytest.raises(RunLogError, match="no such folder"):
        list_runs(tmp_path / "none")
