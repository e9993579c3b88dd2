"""A run's rows in brief, written when it is sealed: what people ask first is answered without reading the rows.

summary.json holds what is counted, and for every (policy, phase, node, kind of duration) its count, sum, extremes and
quantiles; summary.npz the histogram of each, in the same order. Durations are in emulated nanoseconds: divided by the
dilation, all but the base station's own compute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from testbed.errors import RunLogError
from testbed.runlog.catalog import is_recorded
from testbed.runlog.histogram import Ints
from testbed.runlog.schema import TABLES
from testbed.runlog.segment import new_file
from testbed.runlog.summary_rows import COLUMNS, NEEDED, LogRows, RoundRows, batches, log_parts
from testbed.runlog.summary_tally import Histogram, NodeCounts, PhaseCounts, Series, SeriesKey, Tally, exact_series

SUMMARY, HISTOGRAMS, VERSION = "summary.json", "summary.npz", 1
EXACT_THREADS = 4


@dataclass(frozen=True)
class Summary:
    """A run in brief. `files` tells of which rows: name and size of each part of the log."""

    files: dict[str, int]
    rows: int
    series: list[Series]
    nodes: list[NodeCounts]
    phases: list[PhaseCounts]

    def get(self, policy: int, phase: int, device: int | None, column: str) -> Series | None:
        """One series; device None for what the base station does once per round."""
        return self._by_key.get((policy, phase, device, column))

    @cached_property
    def _by_key(self) -> Mapping[SeriesKey, Series]:
        return {(series.policy, series.phase, series.device, series.column): series for series in self.series}


def summary_of(run_dir: Path) -> Summary:
    """The run's summary as it was kept; where there is none it is made, and kept unless rows are still being written.

    Raises RunLogError where the folder holds no rows, or a part of them is missing or damaged.
    """
    files = _files(run_dir)
    kept = _kept(run_dir)
    if kept is not None and kept.files == files:
        return kept
    if not any(name.startswith("rounds-") for name in files):
        raise RunLogError(f"{run_dir}: no rounds in this folder; name the folder of a run")
    return _make(run_dir, files, keep=os.access(run_dir, os.W_OK) and not is_recorded(run_dir))


def write_summary(run_dir: Path) -> None:
    """Sum the run up and keep it, once all its rows are written; nothing where it holds none of a round."""
    files = _files(run_dir)
    parts = log_parts(run_dir, "rounds")
    if parts and set(LogRows(parts).names) >= NEEDED:
        _make(run_dir, files, keep=True)


def exact_summary(run_dir: Path) -> Summary:
    """The summary with quantiles of the rows themselves: all of them are read, column by column."""
    parts = log_parts(run_dir, "rounds")
    counted = summary_of(run_dir)
    if counted.rows == 0:
        return counted
    threads = min(EXACT_THREADS, len(os.sched_getaffinity(0)))
    series = exact_series(RoundRows(LogRows(parts)), threads)
    return Summary(counted.files, counted.rows, series, counted.nodes, counted.phases)


def histogram_of(run_dir: Path, place: int) -> Histogram:
    """Bins and counts of the summary's series number `place`; testbed.runlog.histogram tells the bins' edges."""
    try:
        with np.load(run_dir / HISTOGRAMS, allow_pickle=False) as arrays:
            first, last = arrays["start"][place : place + 2]
            return arrays["bin"][first:last].astype(np.int64), arrays["count"][first:last]
    except (OSError, ValueError, KeyError) as error:
        raise RunLogError(f"{run_dir / HISTOGRAMS}: cannot be read ({error}); remove it, it is made again") from error


def _files(run_dir: Path) -> dict[str, int]:
    parts = [path for table in TABLES for path in log_parts(run_dir, table)]
    return {path.name: path.stat().st_size for path in parts}


def _kept(run_dir: Path) -> Summary | None:
    """None where there is none, or one that is damaged or of another version: it can be made again."""
    try:
        document = json.loads((run_dir / SUMMARY).read_bytes())
        if document["version"] != VERSION or not (run_dir / HISTOGRAMS).exists():
            return None
        return Summary(
            document["files"],
            document["rows"],
            [Series(*values) for values in zip(*document["series"].values(), strict=True)],
            [NodeCounts(**counts) for counts in document["nodes"]],
            [PhaseCounts(**counts) for counts in document["phases"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(run_dir: Path, files: dict[str, int], *, keep: bool) -> Summary:
    tally = Tally()
    for table in batches(log_parts(run_dir, "rounds"), COLUMNS):
        absent = NEEDED - set(table.column_names)
        if absent:
            raise RunLogError(f"{run_dir}: its rounds have no column {min(absent)}; name the folder of a run")
        tally.add(table)
    for table in batches(log_parts(run_dir, "tokens"), ("policy", "phase", "orphaned")):
        tally.add_tokens(table)
    found = list(tally.series())
    summary = Summary(files, tally.rows, [series for series, _ in found], tally.nodes(), tally.phases())
    if keep:
        _write(run_dir, summary, [histogram for _, histogram in found])
    return summary


def _write(run_dir: Path, summary: Summary, histograms: Sequence[Histogram]) -> None:
    """The histograms first: summary.json says that both are there."""
    nothing: Ints = np.empty(0, np.int64)
    with new_file(run_dir / HISTOGRAMS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            start=np.cumsum([0, *(len(bin_B) for bin_B, _ in histograms)]),
            bin=np.concatenate([nothing, *(bin_B for bin_B, _ in histograms)]).astype(np.uint16),
            count=np.concatenate([nothing, *(count_B for _, count_B in histograms)]),
        )
    columns = {field.name: [getattr(series, field.name) for series in summary.series] for field in fields(Series)}
    document = {"version": VERSION, **asdict(replace(summary, series=[])), "series": columns}
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    with new_file(run_dir / SUMMARY) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
