"""What a simulation takes from a log: the routing of a recorded run, and the rounds to compare with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest
from testbed.errors import ConfigError, RunLogError
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status
from testbed.simulation.check import check_run
from testbed.simulation.routing import recorded_blocks
from testbed.simulation.table import check_notes, check_table

DEVICES = ("a", "b")
DILATION = 4.0
MODEL = {"base_s": 0.001, "expert_s": 0.0, "row_s": 0.001}
EXPERT_TK, WEIGHT_TK = np.array([[0, 2], [3, 1], [1, 0]]), np.float32([[0.75, 0.25], [0.5, 0.25], [0.5, 0.5]])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_split(tmp_path / "split", FfnSpec(width=8, inner=12), devices=DEVICES, layers=2, experts=4)[0]


def recorded(folder: Path, *, round_s: float = 0.012, scores: int = 4, band_hz: float = np.nan, **radio: Any) -> Path:
    """Two policies, a prompt of two layers and one decoded token each. Device a gets 5 rows of 1 kB, b none or one."""
    run_dir = folder / "run"
    run_dir.mkdir()
    about = {"config": {"radio": radio or None}, "devices": list(DEVICES), "policies": ["topk", "wlr θ=0.2"]}
    write_manifest(run_dir, {**about, "emulated": dict.fromkeys(DEVICES, MODEL) if radio else {}})
    with Recorder(run_dir, "run", list(DEVICES), top_k=2, experts=scores) as recorder:
        number = 0
        for policy in (0, 1):
            rates = {"down_bits_per_s": [8e6, 8e6], "up_bits_per_s": [16e6, 16e6]}
            recorder.event("channel", policy=policy, prompt=0, factor=[1.0, 2.0], **rates)
            for phase, layer in ((0, 0), (0, 1), (1, 0), (1, 1)):
                columns = round_columns(number, policy, phase, layer, round_s)
                recorder.record_round({**columns, "bandwidth_hz": band_hz}, token_columns(scores, phase))
                number += 1
    return run_dir


def round_columns(number: int, policy: int, phase: int, layer: int, round_s: float) -> dict[str, Any]:
    lost = policy == 1 and phase == GenerationPhase.DECODE and layer == 1
    return {
        "round": number, "policy": policy, "prompt": 0, "layer": layer, "phase": phase, "attempt": 0,
        "rows": [5, 1], "experts_touched": [1, 1], "bytes_down": [5000, 1000], "bytes_up": [5000, 1000],
        "parts_down": 1, "parts_up": 1, "round_ns": int(DILATION * round_s * 1e9), "dilation": DILATION,
        "state_available": True,
        "status": [int(Status.LATE if lost else Status.ANSWERED), int(Status.ANSWERED)],
    }  # fmt: skip


def token_columns(scores: int, phase: int) -> dict[str, Any]:
    kept = slice(0, 1) if phase else slice(None)
    kept_TK = np.ones_like(EXPERT_TK[kept], bool)
    tokens = {
        "expert": EXPERT_TK[kept], "asked": EXPERT_TK[kept], "weight": WEIGHT_TK[kept], "kept": kept_TK,
        "device": EXPERT_TK[kept] % 2,
        "final_weight": WEIGHT_TK[kept], "orphaned": ~kept_TK.any(axis=1),
    }  # fmt: skip
    return {**tokens, "score": np.full((len(kept_TK), scores), 0.25)} if scores else tokens


@pytest.mark.parametrize("scores", [0, 4])
def test_a_recorded_run_gives_the_first_policys_prefill_blocks(tmp_path: Path, manifest: Manifest, scores: int) -> None:
    blocks = recorded_blocks(recorded(tmp_path, scores=scores), manifest)
    assert [(block.prompt, block.routing.layer) for block in blocks] == [(0, 0), (0, 1)]
    for _, routing in blocks:
        np.testing.assert_array_equal(routing.expert_TK, EXPERT_TK)
        np.testing.assert_array_equal(routing.weight_TK, WEIGHT_TK)
        np.testing.assert_array_equal(routing.holds_NE, manifest.holds_NE(routing.layer))
        assert (routing.score_TE is None) == (scores == 0)


def test_a_run_of_another_model_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    one_layer = manifest.model_copy(update={"layers": manifest.layers[:1]})
    with pytest.raises(ConfigError, match="another model"):
        recorded_blocks(recorded(tmp_path), one_layer)


def test_what_is_no_run_is_said(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(RunLogError, match="name the folder of a run"):
        recorded_blocks(tmp_path, manifest)
    with pytest.raises(RunLogError, match="name the folder of a run"):
        check_run(tmp_path)


def test_a_rounds_simulated_time_is_its_slowest_devices_and_dilation_is_taken_out(tmp_path: Path) -> None:
    # device a: 1 + 5 ms of compute, 5 ms down, 2.5 ms up, twice 0.25 ms of delay
    results = check_run(recorded(tmp_path, round_s=0.014, medium="fdd", delay_s=0.00025))
    assert [(row.policy, row.phase, row.rounds) for row in results.rows] == [
        ("topk", "prefill", 2), ("topk", "decode", 2), ("wlr θ=0.2", "prefill", 2), ("wlr θ=0.2", "decode", 1),
    ]  # fmt: skip
    for row in results.rows:
        assert row.measured_p50_s == pytest.approx(0.014)
        assert row.simulated_p50_s == pytest.approx(0.014)
        assert row.difference_p90 == pytest.approx(0, abs=1e-6)
    assert results.holds
    assert results.document()["kind"] == "simulated against measured"


def test_a_device_that_was_slowed_is_simulated_so_and_waits_for_its_turn_on_a_shared_air(tmp_path: Path) -> None:
    # both want the air for their first millisecond: device a waits 1 ms for the other's
    results = check_run(recorded(tmp_path, medium="shared"))
    assert results.rows[0].simulated_p50_s == pytest.approx(0.0135 + 0.001)


def test_a_device_that_was_given_more_of_the_band_is_simulated_with_its_rate(tmp_path: Path) -> None:
    # 8 Mbit/s on 4 MHz is an SNR of 3, 16 Mbit/s one of 15; on 8 MHz these are 1.5 and 7.5
    results = check_run(recorded(tmp_path, medium="fdd", bandwidth_hz=8e6, band_hz=8e6))
    down_s, up_s = (40e3 / (8e6 * math.log2(1 + snr)) for snr in (1.5, 7.5))
    assert results.rows[0].simulated_p50_s == pytest.approx(0.006 + down_s + up_s)


@pytest.mark.parametrize(("round_s", "holds"), [(0.0135 / 0.86, True), (0.0135 / 0.84, False)])
def test_the_claim_is_a_median_difference_of_15_percent(tmp_path: Path, round_s: float, holds: bool) -> None:
    results = check_run(recorded(tmp_path, round_s=round_s, medium="fdd"))
    assert results.holds is holds
    assert results.difference_p50 == pytest.approx(1 - 0.0135 / round_s, abs=1e-6)
    assert ("within" if holds else "ABOVE") in check_notes(results)[0]
    assert check_table(results).row_count == 4


def test_a_run_on_real_links_has_no_model_to_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither links nor devices"):
        check_run(recorded(tmp_path))
