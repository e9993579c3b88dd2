"""The table of a run, from a log written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.experiment.results import Results, summarise
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

LAYERS, DEVICES, TOP_K = 2, 2, 2


def written(folder: Path, *, orphaned_tokens: int = 0, tokens: int = 4) -> Results:
    """Two policies, a scored prompt and a decoded token each; the second is twice as fast and drops a pair."""
    write_manifest(
        folder,
        {
            "config": {"policy": [{"name": "topk"}, {"name": "wlr", "theta": 0.2}], "on_loss": {"invalid_above": 0.01}},
            "layers": LAYERS,
            "emulated": {},
            "links": "none",
        },
    )
    with Recorder(folder, "run", ["a", "b"], top_k=TOP_K, experts=0) as recorder:
        number = 0
        for policy in (0, 1):
            for phase, count in ((GenerationPhase.PREFILL, tokens), (GenerationPhase.DECODE, 1)):
                for layer in range(LAYERS):
                    kept_TK = np.ones((count, TOP_K), bool)
                    kept_TK[0, 1] = policy == 0
                    if policy == 1 and phase is GenerationPhase.PREFILL:
                        kept_TK[:orphaned_tokens] = False
                    recorder.record_round(
                        round_columns(number, policy, layer, phase),
                        {
                            "expert": np.tile([0, 1], (count, 1)),
                            "weight": np.tile(np.float32([0.75, 0.25]), (count, 1)),
                            "kept": kept_TK,
                            "device": np.where(kept_TK, 0, -1),
                            "final_weight": np.where(kept_TK, 0.5, 0),
                            "orphaned": ~kept_TK.any(axis=1),
                        },
                    )
                    number += 1
            recorder.event("scored", policy=policy, prompt=0, tokens=4, nats=4 * math.log(3.0), correct=3)
            recorder.event("generated", policy=policy, prompt=1, token_s=[0.125, 0.25])
    return summarise(folder)


def round_columns(number: int, policy: int, layer: int, phase: GenerationPhase) -> dict[str, Any]:
    status = [Status.ANSWERED, Status.LOST if policy == 1 and number % 4 == 0 else Status.ANSWERED]
    return {
        "round": number, "policy": policy, "prompt": 0, "layer": layer, "phase": int(phase), "attempt": 0, "rows": 2,
        "experts_touched": 1, "bytes_down": 1_000_000, "bytes_up": 500_000, "parts_down": 1, "parts_up": 1,
        "status": [int(s) for s in status], "round_ns": 8_000_000 // (policy + 1), "state_available": True,
    }  # fmt: skip


def test_the_first_policy_is_the_measure_of_the_cut(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path).rows
    assert topk.prefill_cut == 0.0
    assert wlr.prefill_cut == pytest.approx(0.5)
    assert (topk.prefill_block_p50_s, wlr.prefill_block_p50_s) == pytest.approx((0.008, 0.004))


def test_a_decoded_token_takes_the_rounds_of_all_layers(tmp_path: Path) -> None:
    topk, _ = written(tmp_path).rows
    assert topk.decode_rounds_p50_s == pytest.approx(LAYERS * 0.008)
    assert topk.decode_token_p50_s == pytest.approx(0.1875)


def test_quality_comes_from_all_scored_tokens(tmp_path: Path) -> None:
    topk, _ = written(tmp_path).rows
    assert topk.perplexity == pytest.approx(3.0)
    assert topk.accuracy == 0.75


def test_kept_pairs_and_dropped_weight_are_counted_over_both_phases(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path).rows
    assert (topk.kept_fraction, topk.dropped_mass) == (1.0, 0.0)
    pairs, dropped = LAYERS * (4 + 1) * TOP_K, LAYERS * 2
    assert wlr.kept_fraction == pytest.approx(1 - dropped / pairs)
    assert wlr.dropped_mass == pytest.approx(dropped * 0.25 / (pairs / TOP_K))


def test_bytes_and_losses_are_summed_over_rounds_and_devices(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path).rows
    assert (topk.megabytes_down, topk.megabytes_up) == (8.0, 4.0)
    assert (topk.lost, wlr.lost, wlr.late) == (0, 1, 0)


def test_too_many_orphaned_tokens_make_the_result_invalid_and_the_table_says_so(tmp_path: Path) -> None:
    results = written(tmp_path, orphaned_tokens=1)
    assert results.rows[1].orphaned == LAYERS
    assert not results.valid
    assert not results.document()["valid"]
    assert "INVALID" in str(results.table().title)


def test_a_single_orphan_among_many_is_counted_and_still_valid(tmp_path: Path) -> None:
    results = written(tmp_path, orphaned_tokens=1, tokens=200)
    assert results.rows[1].orphaned == LAYERS
    assert results.valid
