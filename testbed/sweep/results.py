"""What a sweep showed: a row per point and policy, read back from the points' files."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from testbed.runlog.segment import new_file
from testbed.sweep.grid import Axes, Grid
from testbed.sweep.pareto import pareto_front
from testbed.sweep.points import Outcome, PointStore

PARQUET = "sweep.parquet"
QUALITY, LATENCY = "perplexity", "prefill_block_p50_s"  # smaller is better

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SweepResults:
    """A sweep's rows: the axes' values, `kind`, the figures of one policy as a run's, `pareto`.

    A row is on the Pareto front (`pareto`) of quality and latency among the rows of its panel: those with the same
    value of the second axis, where there is one. None in a row is unknown.
    """

    name: str
    kind: str  # simulated | measured
    out: Path
    axes: Axes
    rows: list[Row]
    failed: list[dict[str, Any]]  # {"axes", "reason"}
    points: int
    new: int  # of them run by this call
    about: dict[str, Any]  # what the points' documents say beside their rows

    @property
    def panel_axis(self) -> str | None:
        return panel_axis(self.axes)

    @property
    def provenance(self) -> str:
        """Where latency and quality come from, in words."""
        if self.kind == "measured":
            compute = "compute padded to emulated devices; " if self.about.get("emulated") else ""
            links = self.about.get("links", "unknown").partition(",")[0]
            return f"latency and perplexity measured; {compute}links: {links}"
        return f"latency simulated, perplexity {self.about.get('perplexity_from') or 'unknown'}"

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed sweep --json`."""
        return {
            "kind": self.kind,
            "directory": str(self.out),
            "axes": self.axes,
            "points": self.points,
            "new": self.new,
            "failed": self.failed,
            "provenance": self.provenance,
            "rows": self.rows,
        }


def panel_axis(axes: Axes) -> str | None:
    """The axis whose values have a panel and a front each: the second one."""
    return list(axes)[1] if len(axes) > 1 else None


def collect(grid: Grid, store: PointStore, *, new: int) -> SweepResults:
    """Everything the table says, from the points' files."""
    rows: list[Row] = []
    failed: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for point in grid.points:
        outcome = store.outcome(point) or Outcome(None, "its file is gone or damaged", 0.0)
        if outcome.document is None:
            failed.append({"axes": dict(point.axes), "reason": outcome.reason})
            continue
        about = {key: value for key, value in outcome.document.items() if key != "rows"}
        told = {"point": store.path(point).stem, "kind": store.asked.kind, **point.axes}
        rows += [{**told, **row, **point.axes} for row in outcome.document["rows"]]
    mark_front(rows, panel_axis(grid.axes))
    name, kind = grid.base.name, store.asked.kind
    return SweepResults(name, kind, store.out, grid.axes, rows, failed, len(grid.points), new, about)


def mark_front(rows: list[Row], axis: str | None) -> None:
    """Set `pareto` in every row. What is invalid, or whose quality or latency is unknown, is not on a front."""
    panels: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        panels[json.dumps(row[axis]) if axis else ""].append(row)
    for panel in panels.values():
        front = pareto_front([_figure(row, QUALITY) for row in panel], [_figure(row, LATENCY) for row in panel])
        for row, on_it in zip(panel, front, strict=True):
            row["pareto"] = bool(on_it)


def _figure(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or not row.get("valid", True) else float(value)


def write_parquet(results: SweepResults) -> Path:
    """Write all rows as one Parquet file; what Parquet has no type for (params, lists, mixed types) is JSON text."""
    path = results.out / PARQUET
    names = list(dict.fromkeys(name for row in results.rows for name in row))
    columns = {name: _column([row.get(name) for row in results.rows]) for name in names}
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    return path


def _column(values: list[Any]) -> pa.Array:
    if not any(isinstance(value, (dict, list)) for value in values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # text and numbers in one axis
            pass
    return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pa.string())
