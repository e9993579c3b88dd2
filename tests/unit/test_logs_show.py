"""`testbed logs show` over runs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from testbed.cli import main
from testbed.runlog.catalog import write_results
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import PHASES, GenerationPhase, Status

MS = 1_000_000
TOKENS = {"expert": [[0]], "weight": [[1.0]], "asked": [[0]], "kept": [[True]], "device": [[0]],
          "final_weight": [[1.0]], "orphaned": [False]}  # fmt: skip


def recorded(folder: Path, *, emulated: bool = True, close: bool = True, prompts: int = 1, **columns: Any) -> Recorder:
    """Two policies of two devices; each has one prefill and one decode round."""
    folder.mkdir(exist_ok=True)
    workload = {"score_prompts": prompts, "generate_prompts": 0, "new_tokens": 0}
    facts = {
        "config": {"workload": workload, "radio": None}, "policies": ["topk", "wlr"], "devices": ["a", "b"],
        "emulated": {"a": {}} if emulated else {}, "links": "loopback, as they are",
    }  # fmt: skip
    write_manifest(folder, facts)
    recorder = Recorder(folder, "run", ["a", "b"], top_k=1, experts=0)
    for number in range(4):
        row = {
            "round": number, "policy": number // 2, "prompt": 0, "layer": 0, "phase": number % 2, "attempt": 0,
            "rows": 1, "experts_touched": 1, "bytes_down": 1, "bytes_up": 1, "parts_down": 1, "parts_up": 1,
            "status": 1, "state_available": True, "dilation": 4.0, "round_ns": 40 * MS, "select_ns": 8 * MS,
            "down_ns": 8 * MS, "clock_bound_ns": MS, "rtt_ns": 12 * MS, "bs_sent_ns": 100 * MS,
            "bs_received_ns": [105 * MS, 109 * MS],
        }  # fmt: skip
        recorder.record_round(row | columns, TOKENS)
    for policy in (0, 1):
        recorder.event("scored", policy=policy, prompt=0, tokens=1, nats=1.0, correct=1)
    write_results(folder, {"rows": [figures(True), figures(False)]})
    if close:
        recorder.close()
    return recorder


def figures(valid: bool, joule: dict[str, float | None] | None = None) -> dict[str, Any]:
    keys = ("prefill_cut", "prefill_cut_low", "prefill_cut_high", "perplexity")
    return {**dict.fromkeys(keys), "valid": valid, "joule_per_token_measured": joule}


def shown_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["logs", "show", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["logs", "show", *arguments]) == 0
    return capsys.readouterr().out


def of_phase(document: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [times for times in document["policies"][0]["phases"] if times["phase"] == phase]


def test_every_phase_of_the_one_list_is_shown_in_its_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path)
    phases = shown_json(capsys, str(tmp_path))["policies"][0]["phases"]
    order = list(dict.fromkeys((times["where"], times["phase"]) for times in phases))
    on_cpus = [(phase.where, phase.name) for phase in PHASES if not phase.on_gpu]
    assert order[: len(on_cpus)] == on_cpus


def test_copies_between_host_and_gpu_are_phases_where_there_were_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, staging_ns=8 * MS, node_staging_ns=[4 * MS, -1])
    document = shown_json(capsys, str(tmp_path))
    told = {(t["where"], t["node"]): t["p50_ms"] for t in of_phase(document, "staging") if t["count"]}
    assert told == {("BS", None): pytest.approx(8.0, rel=0.01), ("node", "a"): pytest.approx(1.0, rel=0.01)}
    phases = [times["phase"] for times in document["policies"][0]["phases"]]
    assert phases.index("quantise") < phases.index("staging") < phases.index("send")


@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_links_are_in_emulated_time_and_the_base_stations_own_compute_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exact: list[str]
) -> None:
    recorded(tmp_path)
    document = shown_json(capsys, str(tmp_path), *exact)
    assert document["exact"] == bool(exact)
    assert [times["p95_ms"] for times in of_phase(document, "down")] == pytest.approx([2.0] * 4, rel=0.01)
    assert [times["p95_ms"] for times in of_phase(document, "select")] == pytest.approx([8.0] * 2, rel=0.01)
    assert [times["p50_ms"] for times in of_phase(document, "whole round")] == pytest.approx([10.0] * 2, rel=0.01)


def test_a_one_way_time_comes_with_its_bound_in_emulated_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, clock_bound_ns=[MS, 3 * MS])
    down = of_phase(shown_json(capsys, str(tmp_path)), "down")
    assert {times["node"]: times["bound_ms"] for times in down} == {"a": 0.25, "b": 0.75}


def test_a_one_way_time_without_a_bound_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, clock_bound_ns=-1)
    assert all(times["p50_ms"] is None for times in of_phase(shown_json(capsys, str(tmp_path)), "down"))


def test_what_was_not_measured_is_null_and_no_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path)
    for phase in ("gate", "up", "compute"):
        for times in of_phase(shown_json(capsys, str(tmp_path)), phase):
            assert (times["count"], times["mean_ms"], times["p99_ms"]) == (0, None, None)


def test_the_bottleneck_and_late_nodes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, status=[Status.LOST, Status.ANSWERED], bs_received_ns=[-1, 109 * MS])
    nodes = shown_json(capsys, str(tmp_path), "--policy", "1")["policies"][0]["nodes"]
    found = {(node["node"], node["generation"]): (node["bottleneck"], node["lost"]) for node in nodes}
    assert found == {
        ("a", "prefill"): (0, 1), ("a", "decode"): (0, 1), ("b", "prefill"): (1, 0), ("b", "decode"): (1, 0)
    }  # fmt: skip


def test_people_are_told_what_is_emulated_and_which_policy_is_invalid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    text = shown(capsys, str(tmp_path))
    assert "INVALID: wlr: too many orphaned tokens" in text
    assert "emulated ms: real time divided by the run's dilation" in text
    assert "compute: emulated on 1 of 2 devices; links: loopback, as they are" in text
    assert "± is the most" in text
    assert "another one: --policy N" in text
    assert "INVALID:" not in shown(capsys, str(tmp_path), "--policy", "0")


def test_a_run_without_emulation_says_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, emulated=False)
    assert "times: ms as measured" in shown(capsys, str(tmp_path))
    assert "emulated ms" not in shown(capsys, str(tmp_path))


def test_measured_joules_are_shown_and_only_where_a_board_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    assert "J/token" not in shown(capsys, str(tmp_path))
    write_results(tmp_path, {"rows": [figures(True, {"a": 0.125, "b": None}), figures(True)]})
    text = shown(capsys, str(tmp_path))
    assert "0.125" in text
    assert "J/token: measured by the board" in text


def test_a_run_that_ended_early_opens_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, prompts=3)
    assert "ABORTED: the run ended before its last prompt" in shown(capsys, str(tmp_path))
    assert shown_json(capsys, str(tmp_path))["state"] == "aborted"


def test_a_run_that_is_recorded_opens_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = recorded(tmp_path, close=False)
    assert "RUNNING: the run is being recorded" in shown(capsys, str(tmp_path))
    recorder.close()


def test_a_run_that_was_not_summed_up_has_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, prompts=3)
    (tmp_path / "results.json").unlink()
    assert [policy["valid"] for policy in shown_json(capsys, str(tmp_path))["policies"]] == [None, None]


def test_latest_is_the_default_and_an_unknown_policy_or_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path / "20260101-000000-a")
    assert "20260101-000000-a" in shown(capsys, "--logs", str(tmp_path))
    assert main(["logs", "show", "--logs", str(tmp_path), "--policy", "5"]) == 6
    assert "--policy 5: 20260101-000000-a has 0 topk, 1 wlr" in capsys.readouterr().err
    assert main(["logs", "show", "nothing", "--logs", str(tmp_path)]) == 6
    assert capsys.readouterr().err.count("\n") == 1


def test_the_columns_are_of_prefill_and_decode() -> None:
    from testbed.cli.logs_show import GENERATIONS

    assert [phase.name.lower() for phase in GenerationPhase] == list(GENERATIONS)
