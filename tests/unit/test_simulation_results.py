from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from testbed.experiment.results import PolicyResult
from testbed.policies.base import Routing
from testbed.simulation.kernels import SUMS
from testbed.simulation.montecarlo import Simulated
from testbed.simulation.results import SimulatedPolicy, SimulationResults, paired_cut, policy_row
from testbed.simulation.routing import RoutedBlock, pack
from testbed.simulation.table import simulation_notes, simulation_table

ROUTING = Routing(0, np.array([[0, 1], [1, 0]]), np.full((2, 2), 0.5), np.eye(2, dtype=bool))
PACKED = pack([RoutedBlock(0, ROUTING)] * 2)  # 8 pairs, a mass of 4
ABOUT = {"policy": "wlr", "params": {"theta": 0.2}, "bandwidth": "even", "period": "block"}
FACTS = {
    "compute": "paper", "medium": "fdd", "fading": "rayleigh", "routing": "the checkpoint's own gate", "blocks": 2,
    "interval": "95 %", "perplexity_from": None, "draws": 3, "placements": 1,
}  # fmt: skip


def simulated(*sums_s: float, **sums: float) -> Simulated:
    """Draws of two blocks that take so long together."""
    values = {"mass": 0.0, "eq8_s": 1.0, "sent": 8.0, "kept": 8.0, "orphaned": 0.0, **sums}
    sums_DS = np.tile(list(values.values()), (len(sums_s), 1))
    assert sums_DS.shape[1] == SUMS
    return Simulated(np.array([[0.25 * s, 0.75 * s] for s in sums_s]), sums_DS)


def row_of(*found: Simulated, reference: tuple[Simulated, ...], **more: Any) -> SimulatedPolicy:
    return policy_row(ABOUT, found, reference, PACKED, (4100, 2050), more.get("quality"))


def test_a_row_says_what_the_draws_came_to() -> None:
    mine = simulated(1.0, 3.0, 8.0, mass=1.0, eq8_s=0.5, sent=6.0, kept=4.0, orphaned=1.0)
    row = row_of(mine, reference=(simulated(2.0, 4.0, 10.0),), quality=(9.5, 0.5))
    assert row.prefill_block_sum_s == 4.0
    assert row.prefill_cut == pytest.approx(0.25)
    assert row.prefill_cut_low <= 0.25 <= row.prefill_cut_high
    assert row.prefill_cut_p50 == pytest.approx(0.25)
    assert (row.eq8_cut, row.eq8_cut_low, row.eq8_cut_p50) == pytest.approx((0.5, 0.5, 0.5))
    assert (row.kept_fraction, row.dropped_mass, row.orphaned_fraction) == (0.5, 0.25, 0.25)
    assert (row.megabytes_down, row.megabytes_up) == (6 * 4100 / 1e6, 4 * 2050 / 1e6)
    assert (row.perplexity, row.accuracy) == (9.5, 0.5)


def test_a_figure_that_a_run_has_too_has_its_name() -> None:
    same = {
        *("policy", "params", "prefill_block_p50_s", "prefill_block_p95_s", "prefill_block_sum_s", "prefill_cut"),
        *("eq8_cut", "perplexity", "accuracy", "kept_fraction", "dropped_mass", "megabytes_down", "megabytes_up"),
        "orphaned_fraction",
    }
    assert same <= set(SimulatedPolicy.__dataclass_fields__) & set(PolicyResult.__dataclass_fields__)


def test_of_several_placements_the_placements_are_the_pairs() -> None:
    values_D, reference_D = np.array([1.0, 9.0, 2.0, 3.0]), np.full(4, 10.0)
    cut = paired_cut(values_D, reference_D, placements=2)
    assert cut.cut == pytest.approx(1 - 15 / 40)
    assert (cut.low, cut.high) == pytest.approx((1 - 10 / 20, 1 - 5 / 20))


def test_many_draws_are_added_up_in_the_order_in_which_they_came() -> None:
    memory_D = np.repeat(np.random.default_rng(0).uniform(0.5, 1, 40), 100)  # a channel that changes slowly
    slow, quick = (paired_cut(d, np.ones(4000), 1) for d in (memory_D, np.random.default_rng(1).permutation(memory_D)))
    assert slow.cut == pytest.approx(quick.cut)
    assert slow.high - slow.low > 2 * (quick.high - quick.low)


def test_the_document_is_json_that_says_what_was_simulated() -> None:
    rows = [row_of(simulated(1.0), reference=(simulated(2.0),))]
    document = SimulationResults("small", FACTS, rows).document()
    assert (document["kind"], document["rows"][0]["policy"]) == ("simulated", "wlr")
    assert json.loads(json.dumps(document))["rows"][0]["prefill_cut"] == 0.5


def test_the_table_and_its_notes_say_what_is_simulated_and_what_is_not_known() -> None:
    row = row_of(simulated(1.0), reference=(simulated(2.0),))
    assert math.isnan(row.perplexity)
    results = SimulationResults("small", FACTS, [row])
    assert str(simulation_table(results).title).startswith("Simulated")
    notes = " ".join(simulation_notes(results))
    assert "simulated: every latency" in notes
    assert "not measured" in notes
    assert "deep fades" in notes
