"""An evaluation for people: one table, and what one must know beside it."""

from __future__ import annotations

from rich.table import Table

from testbed.cli.output import table
from testbed.evaluation.results import ALL, EvaluationResults, TaskResult
from testbed.experiment.table import INVALID, results_notes

UNKNOWN = "-"
COLUMNS = ["task", "policy", "items", "accuracy\n% (95 %)", "against the first\npoints (95 %)", "block ms\np50",
           "\np95", "blocks\nsum s", "their cut\n% (95 %)", "decode\nms/token", "mass\ndropped"]  # fmt: skip


def evaluation_table(results: EvaluationResults) -> Table:
    """A row per task and policy, task by task."""
    rows = [
        _cells(row, first=row.policy == results.policies[0])
        for task in results.tasks
        for row in results.rows
        if row.task == task
    ]
    title = f"Evaluation {results.overall.run}" + ("" if results.overall.valid else f"  {INVALID}")
    return table(title, COLUMNS, rows)


def evaluation_notes(results: EvaluationResults) -> list[str]:
    metrics = {row.task: row.metric for row in results.rows if row.task != ALL}
    return [
        f"accuracy: {', '.join(f'{task} {metric}' for task, metric in metrics.items())}; interval by Wilson's score; "
        "against the first policy on the same items, interval by a paired bootstrap",
        "block: an expert round while a prompt is read; decode: those of one generated token, median; the base "
        "station's own compute is in neither",
        *results_notes(results.overall),
    ]


def _cells(row: TaskResult, *, first: bool) -> list[str]:
    return [
        row.task,
        row.policy,
        str(row.items),
        _with_interval(row.accuracy, row.accuracy_low, row.accuracy_high),
        UNKNOWN if first else _with_interval(row.difference, row.difference_low, row.difference_high, "+.1f"),
        _ms(row.prefill_block_p50_s),
        _ms(row.prefill_block_p95_s),
        f"{row.prefill_block_sum_s:.2f}",
        UNKNOWN if first else _with_interval(row.prefill_cut, row.prefill_cut_low, row.prefill_cut_high),
        _ms(row.decode_token_rounds_p50_s),
        UNKNOWN if row.dropped_mass is None else f"{100 * row.dropped_mass:.1f} %",
    ]


def _with_interval(mean: float | None, low: float | None, high: float | None, bounds: str = ".0f") -> str:
    if mean is None:
        return UNKNOWN
    interval = "" if low is None or high is None else f" ({100 * low:{bounds}} to {100 * high:{bounds}})"
    sign = "+" if bounds.startswith("+") else ""
    return f"{100 * mean:{sign}.1f}{interval}"


def _ms(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{1e3 * seconds:.2f}"
