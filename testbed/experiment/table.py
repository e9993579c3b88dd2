"""A run's results for people: one table, and what one must know beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rich.table import Table

from testbed.cli.output import table
from testbed.experiment.energy import LEAST_SAMPLES
from testbed.experiment.placements import PlacedPolicy, PlacementResults
from testbed.experiment.results import PolicyResult, Results
from testbed.experiment.run_energy import Board
from testbed.policies.loading import label

INCOMPLETE = "INCOMPLETE: rows were lost"
INVALID = "INVALID: too many tokens lost all their experts, or rounds overran their emulated time"


def results_table(results: Results) -> Table:
    flags = [INCOMPLETE] * bool(results.losses) + [INVALID] * (not results.valid)
    title = "  ".join([f"Run {results.run}", *flags])
    return table(title, [head for head, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in results.rows])


def results_notes(results: Results) -> list[str]:
    compute = "compute, padded to each device's speed in the run file; " if results.emulated else ""
    notes = [
        f"emulated: {compute}links: {results.links}; everything else measured",
        "cut: of the sum of prefill block times, against topk on the same text; Eq. 8: the paper's latency, each token "
        "by itself, at the even split of the band",
        f"log: {results.run_dir}",
    ]
    if results.losses:
        recorded = "figures are of the prompts of which every round was recorded"
        notes.insert(0, f"INCOMPLETE: rows of rounds and tokens {results.losses}; {recorded}")
    overheads = [row.overhead_p50 for row in results.rows if not math.isnan(row.overhead_p50)]
    if overheads:
        overruns = max(row.overrun_fraction for row in results.rows)
        notes.insert(
            -2,
            f"real overhead of a round: {100 * max(overheads):.1f} % of its emulated time in the median; above 10 % in "
            f"{100 * overruns:.1f} % of the rounds",
        )
    energy = _measured_energy(results) + _modelled_energy(results)
    return [*notes, f"energy in J per token, prefill and decode together: {'; '.join(energy)}"] if energy else notes


def _measured_energy(results: Results) -> list[str]:
    per_token = [
        f"{_label(r)} {_joule(r.joule_per_token_measured)}" for r in results.rows if r.joule_per_token_measured
    ]
    rest = ", ".join(f"{name} {_at_rest(board)}" for name, board in results.boards.items())
    how = f"measured (the boards' total power, less what they draw at rest: {rest})"
    return [f"{how} {', '.join(per_token)}"] if per_token else []


def _modelled_energy(results: Results) -> list[str]:
    known = [r for r in results.rows if (r.joule_per_token_modelled or {}).get("total") is not None]
    per_token = [f"{_label(r)} {_joule(r.joule_per_token_modelled or {})}" for r in known]
    how = "modelled, not measured (transmit power over the time on the air, joule_per_flop times FLOP)"
    return [f"{how} {', '.join(per_token)}"] if per_token else []


def _at_rest(board: Board) -> str:
    rail = board.rail or "an unnamed rail"
    if board.idle_w is None:
        return f"unknown on {rail}, {board.idle_samples} samples before the first round, {LEAST_SAMPLES} needed"
    return f"{board.idle_w:.2f} W on {rail}, {board.idle_samples} samples before the first round"


def _joule(joule: Mapping[str, float | None]) -> str:
    return " ".join(f"{name} {'-' if value is None else format(value, '.3g')}" for name, value in joule.items())


def _with_interval(cut: float, low: float, high: float) -> str:
    return _percent(cut) + ("" if math.isnan(low) or low == high else f"\n{100 * low:.0f} to {100 * high:.0f}")


def _pair(low: float, high: float, unit: float = 1e3) -> str:
    return "-" if math.isnan(low) else f"{low * unit:.1f} / {high * unit:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _label(row: PolicyResult | PlacedPolicy) -> str:
    return label(row.policy, row.params, row.bandwidth, row.period)


def _name(row: PolicyResult | PlacedPolicy) -> str:
    return _label(row) + ("" if row.valid else "\nINVALID")


COLUMNS: list[tuple[str, Callable[[PolicyResult], str]]] = [
    ("policy", _name),
    ("prefill\nms/block\np50 / p95", lambda r: _pair(r.prefill_block_p50_s, r.prefill_block_p95_s)),
    ("\ncut\n(95 %)", lambda r: _with_interval(r.prefill_cut, r.prefill_cut_low, r.prefill_cut_high)),
    ("\nEq. 8\ncut", lambda r: _percent(r.eq8_cut)),
    ("decode rounds\nms/token\np50 / p95", lambda r: _pair(r.decode_rounds_p50_s, r.decode_rounds_p95_s)),
    ("decode + BS\nms/token\np50 / p95", lambda r: _pair(r.decode_token_p50_s, r.decode_token_p95_s)),
    ("\nper-\nplexity", lambda r: _number(r.perplexity)),
    ("next\ntoken\nright", lambda r: _percent(r.accuracy)),
    ("\nexperts\nkept", lambda r: _percent(r.kept_fraction)),
    ("gate\nmass\ndropped", lambda r: _percent(r.dropped_mass)),
    ("MB\ndown\n/ up", lambda r: _pair(r.megabytes_down, r.megabytes_up, 1)),
    ("late\n/ lost\n/ orphaned", lambda r: f"{r.late} / {r.lost} / {r.orphaned}"),
]


def placements_table(results: PlacementResults) -> Table:
    title = f"{len(results.runs)} placements" + ("" if results.valid else f"  {INVALID}")
    head = ["policy", "prefill cut\n(95 %)", "Eq. 8 cut\n(95 %)", "decode cut\n(95 %)", "per-\nplexity",
            "next token\nright", "experts\nkept", "gate mass\ndropped", "rounds that\noverran"]  # fmt: skip
    rows = [
        [
            _name(row), _with_interval(*row.prefill), _with_interval(*row.eq8), _with_interval(*row.decode),
            _number(row.perplexity), _percent(row.accuracy), _percent(row.kept_fraction), _percent(row.dropped_mass),
            _percent(row.overrun_fraction),
        ]
        for row in results.rows
    ]  # fmt: skip
    return table(title, head, rows)


def placements_notes(results: PlacementResults) -> list[str]:
    return [
        f"emulated: compute, padded to each device's speed in the run file; links: {results.runs[0].links}; everything "
        "else measured",
        "cut: 1 - sum of times / the same sum under topk, paired per placement; the interval is a bootstrap over "
        "placements",
        *(f"log: {run.run_dir}" for run in results.runs),
    ]
