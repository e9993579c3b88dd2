"""A run's results for people: one table, and what one must know beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.table import Table

from testbed.cli.output import table
from testbed.experiment.results import PolicyResult, Results

INVALID = "INVALID: too many tokens lost all their experts, or rounds overran their emulated time"


def results_table(results: Results) -> Table:
    title = f"Run {results.run}" + ("" if results.valid else f"  {INVALID}")
    return table(title, [head for head, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in results.rows])


def results_notes(results: Results) -> list[str]:
    compute = "compute, padded to each device's speed in the run file; " if results.emulated else ""
    notes = [
        f"emulated: {compute}links: {results.links}; everything else measured",
        "cut: of the sum of prefill block times, against topk on the same text; Eq. 8: the paper's latency, each token "
        "by itself",
        f"log: {results.run_dir}",
    ]
    overheads = [row.overhead_p50 for row in results.rows if not math.isnan(row.overhead_p50)]
    if overheads:
        overruns = max(row.overrun_fraction for row in results.rows)
        notes.insert(
            1,
            f"real overhead of a round: {100 * max(overheads):.1f} % of its emulated time in the median; above 10 % in "
            f"{100 * overruns:.1f} % of the rounds",
        )
    return notes


def _pair(low: float, high: float, unit: float = 1e3) -> str:
    return f"{low * unit:.1f} / {high * unit:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _name(row: PolicyResult) -> str:
    settings = " ".join(f"{key}={value}" for key, value in row.params.items())
    return f"{row.policy} {settings}".strip() + ("" if row.valid else " INVALID")


COLUMNS: list[tuple[str, Callable[[PolicyResult], str]]] = [
    ("policy", _name),
    ("prefill\nms/block\np50 / p95", lambda r: _pair(r.prefill_block_p50_s, r.prefill_block_p95_s)),
    ("\n\ncut", lambda r: _percent(r.prefill_cut)),
    ("\nEq. 8\ncut", lambda r: _percent(r.eq8_cut)),
    ("decode rounds\nms/token\np50 / p95", lambda r: _pair(r.decode_rounds_p50_s, r.decode_rounds_p95_s)),
    ("decode + BS\nms/token\np50 / p95", lambda r: _pair(r.decode_token_p50_s, r.decode_token_p95_s)),
    ("\nper-\nplexity", lambda r: f"{r.perplexity:.3f}"),
    ("next\ntoken\nright", lambda r: _percent(r.accuracy)),
    ("\nexperts\nkept", lambda r: _percent(r.kept_fraction)),
    ("gate\nmass\ndropped", lambda r: _percent(r.dropped_mass)),
    ("MB\ndown\n/ up", lambda r: _pair(r.megabytes_down, r.megabytes_up, 1)),
    ("late\n/ lost\n/ orphaned", lambda r: f"{r.late} / {r.lost} / {r.orphaned}"),
]
