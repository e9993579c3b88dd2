"""A run over several placements: what is set for each, and how their rows are summed up."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.placements import over_placements, placement_overrides, summed_up
from testbed.experiment.results import PolicyResult
from testbed.experiment.statistics import paired_cut_interval
from testbed.experiment.table import placements_notes, placements_table

TOPK_S, FASTER_S = (1.0, 2.0, 4.0), (0.5, 1.5, 2.0)


def row_of(policy: str, prefill_s: float, **changes: Any) -> PolicyResult:
    """A policy's row of one run; all that nobody asks for is 0."""
    named = {"policy": policy, "params": {}, "bandwidth": "even", "period": "block", "valid": True}
    times = {"prefill_block_sum_s": prefill_s, "eq8_sum_s": 2 * prefill_s, "decode_sum_s": 3 * prefill_s}
    numbers = dict.fromkeys(PolicyResult.__dataclass_fields__, 0.0)
    return PolicyResult(**{**numbers, **named, **times, "perplexity": 4.0, "kept_fraction": 1.0, **changes})


def three_runs(**changes: Any) -> list[list[PolicyResult]]:
    """topk and another policy over three placements."""
    return [
        [row_of("topk", topk_s), row_of("wlr", faster_s, params={"theta": 0.2}, **changes)]
        for topk_s, faster_s in zip(TOPK_S, FASTER_S, strict=True)
    ]


def config_of(**radio: Any) -> RunConfig:
    device = {"name": "jetson-0", "distance_m": 100.0}
    return RunConfig.model_validate({"name": "small", "device": [device], "policy": [{"name": "topk"}], **radio})


@pytest.mark.parametrize("radio", [{}, {"radio": {}}])
def test_without_drawn_distances_there_are_no_placements(radio: Any) -> None:
    with pytest.raises(ConfigError, match=r"--placements: .*give the run file \[radio.placement\]") as caught:
        placement_overrides(config_of(**radio), 3)
    assert len(str(caught.value).splitlines()) == 1


def test_every_placement_has_distances_and_fading_of_its_own() -> None:
    config = config_of(radio={"placement": {"seed": 7}})
    assert placement_overrides(config, 3) == [[f"radio.placement.seed={seed}", f"seed={seed}"] for seed in range(3)]


def test_runs_are_made_one_after_the_other_with_their_overrides() -> None:
    asked: list[list[str]] = []
    rows = three_runs()

    def run(overrides: list[str]) -> Any:
        asked.append(overrides)
        return SimpleNamespace(
            rows=rows[len(asked) - 1], run_dir=Path(f"run-{len(asked)}"), emulated={}, links="a relay", valid=True
        )

    results = over_placements(config_of(radio={"placement": {}}), 3, run)
    assert asked == placement_overrides(config_of(radio={"placement": {}}), 3)
    document = results.document()
    assert document["placements"] == 3
    assert document["runs"] == ["run-1", "run-2", "run-3"]
    assert [row["policy"] for row in document["rows"]] == ["topk", "wlr"]
    assert document["valid"]
    assert placements_table(results).row_count == 2
    assert sum("log: run-" in note for note in placements_notes(results)) == 3


def test_a_cut_is_of_the_sums_paired_per_placement() -> None:
    topk, wlr = summed_up(three_runs())
    assert (topk.prefill.cut, wlr.prefill.cut) == (0.0, pytest.approx(1 - 4 / 7))
    for cut in (wlr.prefill, wlr.eq8, wlr.decode):
        assert cut == paired_cut_interval(np.array(FASTER_S), np.array(TOPK_S))
        assert cut.low < cut.cut < cut.high


def test_a_row_has_the_names_of_a_runs_own_rows() -> None:
    row = summed_up(three_runs())[1].row()
    for name in ("prefill", "eq8", "decode"):
        assert row[f"{name}_cut_low"] < row[f"{name}_cut"] < row[f"{name}_cut_high"]
    known = PolicyResult.__dataclass_fields__.keys() | {
        f"{n}_cut{e}" for n in ("eq8", "decode") for e in ("_low", "_high")
    }
    assert row.keys() <= known
    assert (row["policy"], row["params"], row["bandwidth"], row["period"]) == ("wlr", {"theta": 0.2}, "even", "block")


def test_perplexities_are_averaged_as_losses_are() -> None:
    runs = three_runs()
    for row, perplexity in zip(runs, (2.0, 4.0, 8.0), strict=True):
        row[1] = row_of("wlr", 1.0, perplexity=perplexity, kept_fraction=perplexity / 8, dropped_mass=perplexity / 16)
    _, wlr = summed_up(runs)
    assert wlr.perplexity == pytest.approx(4.0)
    assert wlr.kept_fraction == pytest.approx(14 / 24)
    assert wlr.dropped_mass == pytest.approx(14 / 48)


def test_one_invalid_run_makes_its_policys_row_invalid_and_the_worst_overrun_is_told() -> None:
    runs = three_runs()
    runs[1][1] = row_of("wlr", 1.0, valid=False, overrun_fraction=0.25)
    topk, wlr = summed_up(runs)
    assert (topk.valid, wlr.valid) == (True, False)
    assert (topk.overrun_fraction, wlr.overrun_fraction) == (0.0, 0.25)


@pytest.mark.parametrize("missing", [0.0, math.nan], ids=["none of it", "unknown"])
def test_what_no_run_had_is_unknown(missing: float) -> None:
    runs = [[row_of(policy, 1.0, decode_sum_s=missing, eq8_sum_s=missing) for policy in ("topk", "wlr")]] * 3
    _, wlr = summed_up(runs)
    assert all(math.isnan(value) for value in (*wlr.decode, *wlr.eq8))
    assert wlr.prefill.cut == 0.0


def test_a_single_placement_has_a_cut_and_no_interval() -> None:
    _, wlr = summed_up(three_runs()[:1])
    assert wlr.prefill.cut == pytest.approx(0.5)
    assert math.isnan(wlr.prefill.low)
