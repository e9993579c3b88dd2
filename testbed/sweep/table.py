"""A sweep's results for people: one table, and what one must know beside it."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from testbed.cli.output import table
from testbed.experiment.table import INVALID
from testbed.policies.loading import label
from testbed.sweep.grid import at, shown
from testbed.sweep.results import Row, SweepResults

UNKNOWN = "-"


def sweep_table(results: SweepResults) -> Table:
    axes = list(results.axes)
    heads = [*axes, "policy", *(head for head, _ in FIGURES)]
    rows = [
        [*(shown(row[axis]) for axis in axes), row_label(row), *(show(row) for _, show in FIGURES)]
        for row in results.rows
    ]
    heads = [head.replace("+", "\n+ ") for head in heads]
    result = table(f"Sweep {results.name}, {results.kind}: {results.points} points", heads, rows)
    for column in result.columns[: len(axes) + 1]:
        column.justify = "left"
    return result


def sweep_notes(results: SweepResults) -> list[str]:
    axis = results.panel_axis
    among = f" among the rows with its {axis}" if axis else ""
    notes = [
        f"{results.provenance}; {results.points - results.new} points were there before, {results.new} are new",
        f"*: on the Pareto front of perplexity and prefill time{among}; cut: against topk at the same point",
    ]
    invalid = sum(not row.get("valid", True) for row in results.rows)
    if invalid:
        notes.append(f"{invalid} rows are {INVALID}; they are on no front and in no plot")
    notes += [f"failed: {at(failure['axes'])}: {failure['reason']}" for failure in results.failed]
    return notes


def row_label(row: Row) -> str:
    """What table and plot call a row's policy: "wlr θ=0.2", "topk optimal/block"."""
    params = {key: shown(value) for key, value in (row.get("params") or {}).items()}
    return label(str(row["policy"]), params, row.get("bandwidth") or "even", row.get("period") or "block")


def _number(key: str, form: str, unit: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return UNKNOWN if value is None else format(value * unit, form)

    return show


def _interval(key: str) -> Callable[[Row], str]:
    """A share in percent, with its interval where the row has one."""

    def show(row: Row) -> str:
        value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
        if value is None:
            return UNKNOWN
        return f"{100 * value:.1f}" + ("" if low is None or high is None else f" ({100 * low:.1f}…{100 * high:.1f})")

    return show


def _mark(row: Row) -> str:
    return "INVALID" if not row.get("valid", True) else "*" if row["pareto"] else ""


FIGURES: list[tuple[str, Callable[[Row], str]]] = [
    ("prefill\nms/block\np50", _number("prefill_block_p50_s", ".2f", 1e3)),
    ("cut\n%", _interval("prefill_cut")),
    ("Eq. 8\ncut\n%", _interval("eq8_cut")),
    ("per-\nplexity", _number("perplexity", ".3f")),
    ("next\ntoken\nright %", _number("accuracy", ".1f", 100)),
    ("experts\nkept %", _number("kept_fraction", ".1f", 100)),
    ("gate mass\ndropped %", _number("dropped_mass", ".1f", 100)),
    ("MB\ndown", _number("megabytes_down", ".1f")),
    ("MB\nup", _number("megabytes_up", ".1f")),
    ("\n\nfront", _mark),
]
