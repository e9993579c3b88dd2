"""A simulation's results for people: one table, and what one must know beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.table import Table

from testbed.cli.output import table
from testbed.policies.loading import label
from testbed.simulation.check import CheckResults
from testbed.simulation.results import SimulatedPolicy, SimulationResults


def simulation_table(results: SimulationResults) -> Table:
    rows = [[show(row) for _, show in COLUMNS] for row in results.rows]
    return table(f"Simulated: {results.name}", [head for head, _ in COLUMNS], rows)


def simulation_notes(results: SimulationResults) -> list[str]:
    about = results.about
    notes = [
        f"simulated: every latency, by Eq. 6 with {about['compute']} compute and medium {about['medium']}; routing: "
        f"{about['routing']}, {about['blocks']} prefill blocks in every draw",
        "perplexity and next token: measured in process, on the prompts' own channels, with the run file's wire schemes"
        if about["perplexity_from"]
        else "perplexity and next token: not measured (--no-quality)",
        f"cut: against topk in the same draws, {about['interval']}; {about['draws']} draws over "
        f"{about['placements']} placement(s)",
        "Eq. 8: the paper's latency, each token by itself, at the even split of the band",
    ]
    if about["fading"] == "rayleigh":
        notes.append(
            "Rayleigh fading: the mean of 1 / rate is infinite, so rare deep fades decide a sum, and what is cut of it "
            "depends on how many draws there are; the median over the draws does not"
        )
    return notes


def check_table(results: CheckResults) -> Table:
    columns = ["policy", "phase", "rounds", "measured\nms/round", "simulated\nms/round", "difference\np50", "\np90"]
    rows = [
        [
            row.policy, row.phase, str(row.rounds), f"{1e3 * row.measured_p50_s:.2f}",
            f"{1e3 * row.simulated_p50_s:.2f}", _percent(row.difference_p50), _percent(row.difference_p90),
        ]
        for row in results.rows
    ]  # fmt: skip
    return table(f"Measured against simulated: run {results.run}", columns, rows)


def check_notes(results: CheckResults) -> list[str]:
    return [
        f"over all rounds the median difference is {_percent(results.difference_p50)}: "
        + ("within" if results.holds else "ABOVE")
        + f" the {100 * results.claim:.0f} % that are claimed",
        "measured: emulated links and compute, dilation taken out; simulated: Eq. 6 with the logged rows, experts and "
        "bytes of each device and the true channel of its prompt",
    ]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _name(row: SimulatedPolicy) -> str:
    return label(row.policy, row.params, row.bandwidth, row.period)


def _block_times(row: SimulatedPolicy) -> str:
    return f"{1e3 * row.prefill_block_p50_s:.1f} / {1e3 * row.prefill_block_p95_s:.1f}"


def _with_interval(cut: float, low: float, high: float) -> str:
    interval = "" if math.isnan(low) else f" ({round(100 * low, 1) + 0:.1f} to {round(100 * high, 1) + 0:.1f})"
    return _percent(cut) + interval


COLUMNS: list[tuple[str, Callable[[SimulatedPolicy], str]]] = [
    ("policy", _name),
    (
        "simulated\nms/block\np50 / p95",
        lambda r: f"{1e3 * r.prefill_block_p50_s:.1f} / {1e3 * r.prefill_block_p95_s:.1f}",
    ),
    ("\nblock cut\n(95 %)", lambda r: _with_interval(r.prefill_cut, r.prefill_cut_low, r.prefill_cut_high)),
    ("median\nover\ndraws", lambda r: _percent(r.prefill_cut_p50)),
    ("\nEq. 8 cut\n(95 %)", lambda r: _with_interval(r.eq8_cut, r.eq8_cut_low, r.eq8_cut_high)),
    ("\nper-\nplexity", lambda r: "-" if math.isnan(r.perplexity) else f"{r.perplexity:.3f}"),
    ("next\ntoken\nright", lambda r: _percent(r.accuracy)),
    ("\nexperts\nkept", lambda r: _percent(r.kept_fraction)),
    ("gate\nmass\ndropped", lambda r: _percent(r.dropped_mass)),
    ("MB\ndown\n/ up", lambda r: f"{r.megabytes_down:.1f} / {r.megabytes_up:.1f}"),
]
