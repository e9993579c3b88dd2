"""Replay of a log written by hand, in which policies really decided on random routing, states and links."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_node.band import BandPlan, loads, with_idle
from bs_node.blocks import group
from testbed.cli import logs_replay, main
from testbed.errors import ConfigError, RunLogError
from testbed.policies.bandwidth import block_time_s, rates_bits_per_s
from testbed.policies.base import DROPPED, Air, Routing, Selection, State
from testbed.policies.loading import label, make_policy
from testbed.policies.selection import arrived_weights, dropped_share
from testbed.policies.steering import Steered
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.replay import policy_as_run
from testbed.runlog.replay_inputs import Log, read_log, recorded_policy
from testbed.runlog.replay_results import replay
from testbed.runlog.replay_validation import Validation, validate
from testbed.runlog.schema import Status
from testbed.simulation.check import check_run

DEVICES, EXPERTS, TOP_K, LAYERS, WIDTH, BAND_HZ, DILATION = 3, 6, 2, 2, 64, 3e6, 4.0
ROW_BYTES = WIDTH + 4
HOLDS_NE = np.arange(EXPERTS) % DEVICES == np.arange(DEVICES)[:, None]
NAMES = ["a", "b", "c"]
Spec = dict[str, Any]
PURE: list[Spec] = [
    {"name": "topk"},
    {"name": "wlr", "theta": 0.2},
    {"name": "load_aware", "budget": 0.2},
    {"name": "nearest_replica", "metric": "load"},
    {"name": "drop_late", "k_min": 1, "after_s": 1e-4},
]


def routing_of(prompt: int, layer: int, tokens: int, *, scored: bool) -> Routing:
    rng = np.random.default_rng([prompt, layer])
    score_TE = rng.dirichlet(np.ones(EXPERTS), tokens).astype(np.float32)
    expert_TK = np.argsort(-score_TE, axis=1)[:, :TOP_K]
    weight_TK = np.take_along_axis(score_TE, expert_TK, axis=1)
    return Routing(layer, expert_TK, weight_TK, HOLDS_NE, score_TE if scored else None)


def state_of(prompt: int, *, band: bool) -> State:
    """Costs of devices whose links are known; band: and can be shared out."""
    rng = np.random.default_rng([7, prompt])
    snr_hz_WN = rng.uniform(1, 200, (2, DEVICES)) * BAND_HZ / DEVICES
    air = Air(BAND_HZ, snr_hz_WN, np.full_like(snr_hz_WN, np.nan))
    air = replace(air, row_s_WN=8 * ROW_BYTES / rates_bits_per_s(air, np.full(DEVICES, 1 / DEVICES)))
    compute_s_N = rng.uniform(1e-5, 4e-4, DEVICES)
    row_s_N, expert_s_N = compute_s_N + air.row_s_WN.sum(axis=0), rng.uniform(0, 1e-4, DEVICES)
    known_N = np.ones(DEVICES, bool)
    return State(row_s_N, known_N, np.zeros(DEVICES), np.zeros(DEVICES), expert_s_N, row_s_N, air if band else None)


def manifest_of(
    specs: Sequence[Spec], scores: str, band: bool, steering: Spec | None, medium: str | None
) -> dict[str, Any]:
    radio = {"bandwidth_hz": BAND_HZ, "medium": medium or "fdd", "delay_s": 2e-4}
    config = {
        "policy": [{"bandwidth": "even", "period": "block", **spec} for spec in specs],
        "placement": None,
        "radio": radio if band or medium else None,
        "emulation": {"as_if_width": WIDTH},
        "wire": {"down": "int8", "up": "int8"},
        "log": {"scores": scores},
        "steering": steering,
    }
    names = [label(spec["name"], {k: v for k, v in spec.items() if k != "name"}) for spec in specs]
    emulated = {name: {"base_s": 1e-4, "expert_s": 2e-4, "row_s": 1e-4} for name in NAMES if medium}
    about = {"policies": names, "devices": NAMES, "layers": LAYERS, "emulated": emulated, "links": "none"}
    return {"config": config, **about}


def written(
    folder: Path,
    specs: Sequence[Spec],
    *,
    scores: str = "float32",
    band: bool = False,
    prompts: int = 3,
    tokens: int = 12,
    steering: Spec | None = None,
    unknown: int | None = None,
    lose: bool = False,
    medium: str | None = None,
) -> Log:
    """A run in which every block took what its state predicted, and one token was decoded after the prompts.

    unknown: a device never measured; lose: the last device of the first round never answers; medium: of links that
    were emulated, as were devices.
    """
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest_of(specs, scores, band, steering, medium))
    kept = 0 if scores == "none" else EXPERTS
    dtype = "float16" if scores == "float16" else "float32"
    with Recorder(folder, "run", NAMES, top_k=TOP_K, experts=kept, score_dtype=dtype) as recorder:
        number = 0
        for index, spec in enumerate(specs):
            params = {k: v for k, v in spec.items() if k not in ("name", "bandwidth", "period")}
            policy, plan = make_policy(spec["name"], params), BandPlan(spec.get("bandwidth", "even"))
            if steering and hasattr(policy, "strength_name"):
                policy = Steered(policy, steering["target_ms"] / 1e3)
            for prompt, layer in np.ndindex(prompts + 1, LAYERS):
                decode = prompt == prompts
                if medium:
                    rates = {"down_bits_per_s": [2e6, 4e6, 6e6], "up_bits_per_s": [6e6, 4e6, 2e6]}
                    recorder.event("channel", policy=index, prompt=prompt, factor=[1.0, 2.0, 1.0], **rates)
                routing = routing_of(prompt, layer, 1 if decode else tokens, scored=scores != "none")
                state = state_of(prompt, band=band)
                if unknown is not None:
                    state.row_s_N[unknown] = state.token_s_N[unknown] = np.nan
                if isinstance(policy, Steered):
                    policy.begin(int(decode))
                selection = policy.select(routing, state)
                share_N = selection.bandwidth_share_N
                asked_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
                blocks = group(asked_TK, selection.device_TK, *HOLDS_NE.shape)
                if share_N is None:
                    share_N = plan.share_N(blocks, state, prompt)
                lost = lose and number == 0
                keys = {"round": number, "policy": index, "prompt": prompt, "layer": layer, "phase": int(decode)}
                rounds = round_columns(blocks, state, share_N, lost)
                recorder.record_round({**keys, **rounds}, token_columns(routing, selection, asked_TK, lost))
                if isinstance(policy, Steered):
                    round_s = rounds["round_ns"] / DILATION / 1e9
                    policy.observe(int(decode), round_s, dropped_share(routing, selection))
                number += 1
    return read_log(folder)


def round_columns(blocks: Any, state: State, share_N: Any, lost: bool) -> dict[str, Any]:
    rows_N, experts_N = loads(blocks, DEVICES)
    status_N = np.where(rows_N > 0, Status.ANSWERED, Status.IDLE)
    status_N[-1] = Status.LOST if lost else status_N[-1]
    given_N = np.full(DEVICES, 1 / DEVICES) if share_N is None else with_idle(share_N)
    seconds = block_time_s(rows_N, experts_N, state, given_N if state.air else None)
    columns = {
        "attempt": 0, "dilation": DILATION, "rows": rows_N, "experts_touched": experts_N, "parts_down": 1,
        "bytes_down": rows_N * ROW_BYTES + 60 * (rows_N > 0), "bytes_up": rows_N * ROW_BYTES + 90 * (rows_N > 0),
        "parts_up": 1, "status": status_N,
        "round_ns": -1 if np.isnan(seconds) else int(seconds * DILATION * 1e9),
        "state_token_s": state.token_s_N, "state_available": state.available_N, "state_age_s": state.age_s_N,
        "state_base_s": state.base_s_N, "state_expert_s": state.expert_s_N, "state_row_s": state.row_s_N,
    }  # fmt: skip
    if state.air is not None:
        columns["bandwidth_hz"] = given_N * BAND_HZ
        rates = rates_bits_per_s(state.air, given_N)
        columns["asked_down_bits_per_s"], columns["asked_up_bits_per_s"] = rates
    return columns


def token_columns(routing: Routing, selection: Selection, asked_TK: Any, lost: bool) -> dict[str, Any]:
    arrived_TK = selection.device_TK != DROPPED
    final_TK = selection.weight_TK
    if lost:
        arrived_TK = arrived_TK & (selection.device_TK != DEVICES - 1)
        final_TK = arrived_weights(selection, arrived_TK)
    columns = {
        "expert": routing.expert_TK, "weight": routing.weight_TK, "asked": asked_TK, "kept": arrived_TK,
        "device": selection.device_TK, "final_weight": final_TK, "orphaned": ~arrived_TK.any(axis=1),
    }  # fmt: skip
    return columns if routing.score_TE is None else {**columns, "score": routing.score_TE}


def assert_all_reproduced(results: Validation) -> None:
    for row in results.reproduced:
        assert row.refused is None
        assert row.exact_inputs
        assert (row.same, row.same_weights) == (row.rounds, row.rounds), row.policy
    assert results.reproduces


@pytest.mark.parametrize("scores", ["float16", "none"])
def test_policies_that_see_only_what_is_logged_are_reproduced_to_the_bit(tmp_path: Path, scores: str) -> None:
    assert_all_reproduced(validate(written(tmp_path, PURE, scores=scores)))


def test_what_was_lost_on_the_way_does_not_count_as_another_decision(tmp_path: Path) -> None:
    assert_all_reproduced(validate(written(tmp_path, PURE[:2], lose=True)))


def test_a_steered_policy_is_reproduced_since_the_log_keeps_what_steers_it(tmp_path: Path) -> None:
    results = validate(written(tmp_path, PURE[:3], steering={"target_ms": 1.0, "quality_budget": None}))
    assert_all_reproduced(results)
    assert {row.policy for row in results.predicted} == set()  # what steers it was measured under itself


def test_substitution_is_reproduced_from_full_scores_and_only_claimed_for_those(tmp_path: Path) -> None:
    specs = [{"name": "topk"}, {"name": "substitute", "budget": 0.3}]
    assert_all_reproduced(validate(written(tmp_path / "full", specs)))
    half = validate(written(tmp_path / "half", specs, scores="float16"))
    assert not half.reproduced[1].exact_inputs
    assert half.reproduces
    assert any("half precision" in note for note in half.notes)


def test_substitution_is_refused_by_name_where_no_scores_were_kept(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:1], scores="none")
    with pytest.raises(ConfigError, match="substitute: the log kept no score"):
        replay(log, recorded_policy(log, 0), make_policy("substitute", {}))


def test_a_policy_replayed_on_anothers_rounds_answers_as_it_did_and_takes_as_long(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:3])
    results = validate(log)
    assert {row.policy for row in results.predicted} == {"wlr θ=0.2", "load_aware budget=0.2"}
    assert all(row.difference_p50 < 1e-6 for row in results.predicted)
    wlr = replay(log, recorded_policy(log, 0), make_policy("wlr", {"theta": 0.2}))
    itself = replay(log, recorded_policy(log, 1), make_policy("wlr", {"theta": 0.2}))
    for phase, own in zip(wlr.phases, itself.phases, strict=True):
        assert phase.kept_fraction == own.recorded_kept_fraction
        assert phase.dropped_mass == pytest.approx(own.recorded_dropped_mass)
        assert phase.rows_per_round == own.recorded_rows_per_round
        assert [cut.cut for cut in own.predicted] == [0.0]


def test_the_cut_is_of_sums_paired_by_prompt_against_what_was_run_and_what_is_predicted_of_it(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:3])
    prefill = replay(log, recorded_policy(log, 0), make_policy("load_aware", {"budget": 0.2})).phases[0]
    own = recorded_policy(log, 2)
    topk_s = recorded_policy(log, 0).measured_s_R[own.phase_R == 0].sum()
    cut = 1 - own.measured_s_R[own.phase_R == 0].sum() / topk_s
    assert (prefill.phase, prefill.prompts, prefill.rounds) == ("prefill", 3, 6)
    (predicted,) = prefill.predicted
    assert (predicted.by, predicted.rounds) == ("estimates", 6)
    assert predicted.cut == pytest.approx(cut, rel=1e-6)
    assert predicted.cut_of_measured == pytest.approx(cut, rel=1e-6)
    assert predicted.cut_low <= predicted.cut <= predicted.cut_high


def test_shares_of_the_band_are_replayed_from_the_rates_that_were_asked(tmp_path: Path) -> None:
    specs: list[Spec] = [{"name": "topk"}, {"name": "topk", "bandwidth": "optimal"}, {"name": "joint", "budget": 0.1}]
    log = written(tmp_path, specs, band=True)
    results = validate(log)
    topk, optimal, joint = results.reproduced
    assert (topk.same_shares, optimal.same_shares, joint.same_shares) == (None, optimal.rounds, joint.rounds)
    assert (topk.exact_inputs, optimal.exact_inputs, joint.exact_inputs) == (True, True, False)
    assert joint.same == joint.same_weights == joint.rounds
    assert all(row.difference_p50 < 1e-4 for row in results.predicted)
    faster = replay(log, recorded_policy(log, 0), make_policy("topk", {}), "optimal").phases[0].predicted[0]
    assert faster.cut > 0.01


@pytest.mark.parametrize(("medium", "band"), [("fdd", True), ("fdd", False), ("shared", False)])
def test_the_true_channel_gives_what_the_simulation_of_the_recorded_rounds_gives(
    tmp_path: Path, medium: str, band: bool
) -> None:
    log = written(tmp_path, PURE[:3], medium=medium, band=band)
    simulated = {(row.policy, row.phase): row.simulated_p50_s for row in check_run(tmp_path).rows}
    for index in range(3):
        own = replay(log, recorded_policy(log, index), policy_as_run(log, index))
        on_first = replay(log, recorded_policy(log, 0), policy_as_run(log, index))
        for results, phase in [(own, 0), (own, 1), (on_first, 0), (on_first, 1)]:
            predicted = results.phases[phase].predicted[0]
            assert predicted.by == "channel"
            wanted_s = simulated[own.recorded, results.phases[phase].phase]
            assert predicted.replayed_p50_s == pytest.approx(wanted_s, rel=1e-3)


def test_where_rates_are_shaped_what_needs_the_links_is_refused_by_name(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:1])
    config = {**log.manifest["config"], "shaping": {"bits_per_s": 1e8}}
    shaped = replace(log, manifest={**log.manifest, "config": config})
    with pytest.raises(ConfigError, match="oracle: where rates are shaped"):
        replay(shaped, recorded_policy(shaped, 0), make_policy("oracle", {}))


def test_where_there_was_no_band_none_is_shared_out(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:1])
    with pytest.raises(ConfigError, match="topk with bandwidth 'optimal': the run had no band"):
        replay(log, recorded_policy(log, 0), make_policy("topk", {}), "optimal")


def as_older(folder: Path, log: Log) -> Log:
    """The same log as the first schema had it."""
    newer = ("bandwidth_hz", "asked_down_bits_per_s", "asked_up_bits_per_s", "asked")
    for table in ("rounds", "tokens"):
        path = folder / f"{table}-0000.parquet"
        rows = pq.read_table(path)
        pq.write_table(rows.drop_columns([name for name in newer if name in rows.column_names]), path)
    return read_log(folder)


def test_an_older_run_opens_and_only_what_needs_its_links_is_refused_by_name(tmp_path: Path) -> None:
    log = as_older(tmp_path, written(tmp_path, PURE[:3], band=True))
    assert_all_reproduced(validate(log))
    recorded = recorded_policy(log, 0)
    with pytest.raises(ConfigError, match="joint: this run is older"):
        replay(log, recorded, make_policy("joint", {}))


def test_a_block_on_a_device_that_was_never_measured_has_no_time_rather_than_none_to_wait_for(tmp_path: Path) -> None:
    log = written(tmp_path, PURE[:1], unknown=1)
    prefill = replay(log, recorded_policy(log, 0), make_policy("wlr", {})).phases[0]
    assert prefill.predicted[0].rounds == 0
    assert np.isnan(prefill.predicted[0].cut)
    assert json.dumps(prefill.rows_per_round)


def test_a_run_that_was_killed_while_it_wrote_opens_up_to_its_last_whole_round(tmp_path: Path) -> None:
    written(tmp_path, PURE[:2])
    path = tmp_path / "rounds-0000.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(0, rows.num_rows - 1), path)
    results = validate(read_log(tmp_path))
    assert [row.rounds for row in results.reproduced] == [8, 7]
    assert results.reproduces


def test_rounds_of_which_tokens_are_missing_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    written(tmp_path, PURE[:2])
    path = tmp_path / "tokens-0000.parquet"
    pq.write_table(pq.read_table(path).slice(3), path)
    log = read_log(tmp_path)
    results = validate(log)
    assert [row.rounds for row in results.reproduced] == [7, 8]
    assert results.reproduces
    assert "left out: 1 rounds, since the log lost tokens of theirs" in results.notes
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(RunLogError, match="no round of policy 0"):
        recorded_policy(read_log(tmp_path), 0)


def test_a_policy_that_the_run_has_not_is_answered_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has 0 topk, 1 wlr"):
        recorded_policy(written(tmp_path, PURE[:2]), 2)


@settings(deadline=None, max_examples=10)
@given(theta=st.floats(0, 0.25), more=st.floats(0, 0.25))
def test_a_stronger_threshold_never_keeps_more(log: Log, theta: float, more: float) -> None:
    recorded = recorded_policy(log, 0)
    weak, strong = (replay(log, recorded, make_policy("wlr", {"theta": t})).phases[0] for t in (theta, theta + more))
    assert strong.kept_fraction <= weak.kept_fraction
    assert strong.dropped_mass >= weak.dropped_mass - 1e-12


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return written(tmp_path_factory.mktemp("run"), PURE[:2])


def test_no_theta_is_the_unmodified_model(log: Log) -> None:
    results = replay(log, recorded_policy(log, 0), make_policy("wlr", {"theta": 0.0}))
    for phase in results.phases:
        assert (phase.kept_fraction, phase.dropped_mass) == (1.0, 0.0)
        assert all(cut.cut == 0 for cut in phase.predicted)


def test_neither_torch_nor_a_socket_is_loaded_for_a_replay() -> None:
    code = (
        "import sys, testbed.cli.logs_replay, testbed.runlog.replay_results, testbed.runlog.replay_validation;"
        "print([name for name in ('torch', 'transformers', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_that_is_not_reproduced_is_said_and_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path, PURE[:2])
    manifest = json.loads(json.dumps(log.manifest))
    manifest["config"]["policy"][1]["theta"] = 0.4
    write_manifest(tmp_path, manifest)
    assert main(["logs", "replay", str(tmp_path), "--validate", "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not document["reproduces"]
    assert document["reproduced"][0]["same"] == 8 > document["reproduced"][1]["same"]


def test_the_command_says_what_replay_cannot_know(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["logs", "replay", str(log.run_dir)]
    assert main([*run, "--policy", "wlr", "--param", "theta=0.3"]) == 0
    out = capsys.readouterr().out
    assert "wlr θ=0.3, replayed on topk" in out
    assert "cannot know: what a dropped" in out
    assert main([*run, "--policy", "wlr", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["kind"], document["recorded"], document["params"]) == ("replayed", "topk", {"theta": 0.2})
    assert main([*run, "--validate"]) == 0
    assert "16 of 16 rounds reproduced to the bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name either a --policy"),
        (["--policy", "wlr", "--validate"], "name either a --policy"),
        (["--policy", "wlr", "--param", "theta"], "write KEY=VALUE"),
        (["--policy", "wlr", "--param", "theta=x"], "theta must be a number"),
        (["--policy", "wlrr"], 'did you mean "wlr"'),
        (["--policy", "topk", "--period", "prompt"], "without effect"),
        (["--validate", "--param", "theta=0.1"], "leave out --param"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    log: Log, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["logs", "replay", str(log.run_dir), *arguments]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_example_is_a_command() -> None:
    assert logs_replay.EXAMPLE.startswith("Example: testbed logs replay")
