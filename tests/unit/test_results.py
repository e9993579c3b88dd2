"""The table of a run, from a log written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from testbed.experiment.emulated_time import EMULATED_ROUND
from testbed.experiment.policy_rows import prompt_sums_s
from testbed.experiment.results import Results, summarise
from testbed.experiment.table import results_notes, results_table
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

LAYERS, DEVICES, TOP_K = 2, 2, 2
BAND = {"bandwidth": "even", "period": "block"}


def written(
    folder: Path,
    *,
    orphaned_tokens: int = 0,
    tokens: int = 4,
    dilation: float = 1.0,
    compute_share: float | None = None,
    token_s: Sequence[float] = (),
    asked_K: Sequence[int] = (0, 1),
    **of_manifest: Any,
) -> Results:
    """Two policies, a scored prompt and a decoded token each; the second is twice as fast and drops a pair.

    compute_share: of a round's time, on an emulated device; token_s: of one token alone on each device, as the channel
    has it.
    """
    write_manifest(
        folder,
        {
            "config": {
                "policy": [{"name": "topk", **BAND}, {"name": "wlr", "theta": 0.2, **BAND}],
                "on_loss": {"invalid_above": 0.01},
                "radio": None,
            },
            "layers": LAYERS,
            "devices": ["a", "b"],
            "emulated": {} if compute_share is None else dict.fromkeys("ab", emulated(compute_share, dilation)),
            "links": "none",
            **of_manifest,
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
                        round_columns(number, policy, layer, phase, dilation),
                        {
                            "expert": np.tile([0, 1], (count, 1)),
                            "weight": np.tile(np.float32([0.75, 0.25]), (count, 1)),
                            "asked": np.tile(asked_K, (count, 1)),
                            "kept": kept_TK,
                            "device": np.where(kept_TK, [0, 1], -1),
                            "final_weight": np.where(kept_TK, 0.5, 0),
                            "orphaned": ~kept_TK.any(axis=1),
                        },
                    )
                    number += 1
            recorder.event("scored", policy=policy, prompt=0, tokens=4, nats=4 * math.log(3.0), correct=3)
            recorder.event("generated", policy=policy, prompt=1, token_s=[0.125])
            if token_s:
                recorder.event("channel", policy=policy, prompt=0, token_s=list(token_s), factor=[1.0, 1.0])
    return summarise(folder)


def emulated(compute_share: float, dilation: float) -> dict[str, float]:
    """A device that computes for this share of a round of 8 ms if it gets two rows, and of one of 4 ms if one."""
    return {"base_s": 0.0, "expert_s": 0.0, "row_s": compute_share * 0.004 / dilation}


def round_columns(number: int, policy: int, layer: int, phase: GenerationPhase, dilation: float) -> dict[str, Any]:
    status = [Status.ANSWERED, Status.LOST if policy == 1 and number % 4 == 0 else Status.ANSWERED]
    rows = 2 // (policy + 1)
    return {
        "round": number, "policy": policy, "prompt": 0, "layer": layer, "phase": int(phase), "attempt": 0, "rows": rows,
        "experts_touched": 1, "bytes_down": 1_000_000, "bytes_up": 500_000, "parts_down": 1, "parts_up": 1,
        "status": [int(s) for s in status], "round_ns": rows * 4_000_000, "state_available": True, "dilation": dilation,
    }  # fmt: skip


def test_the_first_policy_is_the_measure_of_the_cut(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path).rows
    assert topk.prefill_cut == 0.0
    assert wlr.prefill_cut == pytest.approx(0.5)
    assert (topk.prefill_block_p50_s, wlr.prefill_block_p50_s) == pytest.approx((0.008, 0.004))


def test_a_decoded_token_takes_the_rounds_of_all_layers(tmp_path: Path) -> None:
    topk, _ = written(tmp_path).rows
    assert topk.decode_rounds_p50_s == pytest.approx(LAYERS * 0.008)
    assert topk.decode_token_p50_s == pytest.approx(0.125)


def test_times_of_rounds_are_emulated_ones(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path, dilation=4.0).rows
    assert (topk.prefill_block_p50_s, wlr.prefill_block_p95_s) == pytest.approx((0.002, 0.001))
    assert topk.prefill_block_sum_s == pytest.approx(LAYERS * 0.002)
    assert topk.decode_rounds_p50_s == pytest.approx(LAYERS * 0.002)
    assert wlr.prefill_cut == pytest.approx(0.5)


def test_the_base_stations_own_part_of_a_token_is_not_stretched(tmp_path: Path) -> None:
    topk, _ = written(tmp_path, dilation=4.0).rows
    own_s = 0.125 - LAYERS * 0.008
    assert topk.decode_token_p50_s == pytest.approx(own_s + LAYERS * 0.002)


def test_the_papers_latency_is_cut_by_what_is_not_sent_to_the_slower_device(tmp_path: Path) -> None:
    topk, wlr = written(tmp_path, token_s=(1.0, 3.0)).rows
    assert topk.eq8_cut == 0.0
    assert wlr.eq8_cut == pytest.approx(1 - (1 + 3 + 3 + 3) / (4 * 3))  # one of four tokens avoids it


def test_the_papers_latency_is_unknown_where_no_channel_was_emulated(tmp_path: Path) -> None:
    assert all(math.isnan(row.eq8_cut) for row in written(tmp_path).rows)


@pytest.mark.parametrize("dilation", [1.0, 4.0])
def test_rounds_that_overran_their_emulated_time_make_the_result_invalid(tmp_path: Path, dilation: float) -> None:
    results = written(tmp_path, compute_share=0.8, dilation=dilation)
    assert [row.overhead_p50 for row in results.rows] == pytest.approx([0.25, 0.25])
    assert [row.overrun_fraction for row in results.rows] == [1.0, 1.0]
    assert not results.valid
    assert "INVALID" in str(results_table(results).title)
    assert any("25.0 % of its emulated time" in note for note in results_notes(results))


def test_rounds_within_their_emulated_time_are_valid_and_their_overhead_is_told(tmp_path: Path) -> None:
    results = written(tmp_path, compute_share=0.95)
    assert results.rows[0].overhead_p50 == pytest.approx(1 / 19, rel=1e-3)
    assert results.rows[0].overrun_fraction == 0.0
    assert results.valid
    assert any("above 10 % in 0.0 % of the rounds" in note for note in results_notes(results))


def test_without_emulation_there_is_no_overhead_to_tell(tmp_path: Path) -> None:
    results = written(tmp_path)
    assert math.isnan(results.rows[0].overhead_p50)
    assert results.valid
    assert not any("overhead" in note for note in results_notes(results))


def test_the_table_has_a_row_a_policy_and_a_dash_for_the_unknown(tmp_path: Path) -> None:
    results = written(tmp_path)
    table = results_table(results)
    assert table.row_count == len(results.rows)
    cells = {str(column.header).replace("\n", " ").strip(): list(column.cells) for column in table.columns}
    assert cells["policy"] == ["topk", "wlr θ=0.2"]
    assert cells["cut (95 %)"] == ["0.0 %", "50.0 %"]
    assert cells["Eq. 8 cut"] == ["-", "-"]


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
    assert "INVALID" in str(results_table(results).title)


def test_a_single_orphan_among_many_is_counted_and_still_valid(tmp_path: Path) -> None:
    results = written(tmp_path, orphaned_tokens=1, tokens=200)
    assert results.rows[1].orphaned == LAYERS
    assert results.valid


def test_weight_that_another_expert_computed_counts_as_dropped(tmp_path: Path) -> None:
    """In place of every token's second expert another is asked, and nothing else changes."""
    topk, wlr = written(tmp_path, asked_K=(0, 5)).rows
    assert topk.kept_fraction == 1.0
    assert topk.dropped_mass == pytest.approx(0.25)
    assert wlr.dropped_mass == pytest.approx(0.25), "what was dropped besides would have been replaced"


def test_a_row_says_how_the_band_was_shared_out(tmp_path: Path) -> None:
    own = [{"name": "topk", **BAND}, {"name": "wlr", "theta": 0.2, "bandwidth": "optimal", "period": "prompt"}]
    config = {"policy": own, "on_loss": {"invalid_above": 0.01}, "radio": None}
    results = written(tmp_path, config=config)
    assert [(row.bandwidth, row.period, row.params) for row in results.rows] == [
        ("even", "block", {}), ("optimal", "prompt", {"theta": 0.2}),
    ]  # fmt: skip
    assert list(results_table(results).columns[0].cells) == ["topk", "wlr θ=0.2 optimal/prompt"]


def test_a_steered_policy_is_called_by_what_it_was_steered_to(tmp_path: Path) -> None:
    results = written(tmp_path, policy_params=[{}, {"target_ms": 5.0}])
    assert list(results_table(results).columns[0].cells) == ["topk", "wlr target_ms=5.0"]
    assert results.document()["rows"][1]["params"] == {"target_ms": 5.0}


def rounds_table(rows: Sequence[tuple[int, int, int, float]]) -> pa.Table:
    """(prompt, phase, device, emulated seconds)."""
    return pa.table({
        name: [row[place] * (1e9 if name == EMULATED_ROUND else 1) for row in rows]
        for place, name in enumerate(("prompt", "phase", "device", EMULATED_ROUND))
    })  # fmt: skip


def test_a_prompts_sum_is_of_its_prefill_rounds_each_counted_once() -> None:
    table = rounds_table(
        [(4, 0, 0, 1.0), (4, 0, 1, 1.0), (2, 0, 0, 3.0), (4, 0, 0, 5.0), (4, 1, 0, 9.0), (7, 1, 0, 9.0)]
    )
    assert prompt_sums_s(table).tolist() == [3.0, 6.0]  # of prompts 2 and 4; 7 only decoded


def test_without_prefill_there_are_no_sums() -> None:
    assert prompt_sums_s(rounds_table([(0, 1, 0, 9.0)])).tolist() == []


def test_one_prompt_has_a_cut_and_no_interval(tmp_path: Path) -> None:
    _, wlr = written(tmp_path).rows
    assert wlr.prefill_cut == pytest.approx(0.5)
    assert math.isnan(wlr.prefill_cut_low)
    assert math.isnan(wlr.prefill_cut_high)
