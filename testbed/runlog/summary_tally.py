"""Adds up the rows of a run, part by part, into what its summary holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from testbed.runlog.histogram import Floats, Ints, bin_of, quantiles_ns
from testbed.runlog.schema import Status
from testbed.runlog.summary_rows import MEASURES, Grouped, Measure, RoundRows, waits

QUANTILES = (0.5, 0.95, 0.99)
LOST = (Status.LOST, Status.REJECTED, Status.INVALID)
Histogram = tuple[Ints, Ints]  # bins that hold something, ascending, and how much
SeriesKey = tuple[int, int, int | None, str]


@dataclass(frozen=True, slots=True)
class Series:
    """Durations of one kind, emulated ns. `device` is None for what the base station does once per round."""

    policy: int
    phase: int
    device: int | None
    column: str  # of `rounds`
    count: int
    sum_ns: float
    min_ns: float
    max_ns: float
    p50_ns: float
    p95_ns: float
    p99_ns: float


@dataclass(slots=True)
class NodeCounts:
    """What became of one node's requests."""

    policy: int
    phase: int
    device: int
    requests: int = 0
    late: int = 0
    lost: int = 0  # its connection went away, it refused, or its reply was broken
    bottleneck: int = 0  # rounds that waited for it last, or in vain
    alone_ns: float = 0.0  # emulated; in which nothing but its reply was waited for


@dataclass(slots=True)
class PhaseCounts:
    """Of all nodes together: rounds, tokens times layers, and those of them without any expert's output."""

    policy: int
    phase: int
    rounds: int = 0
    routed: int = 0
    orphaned: int = 0


@dataclass(slots=True)
class _Running:
    count: int = 0
    sum_ns: float = 0.0
    min_ns: float = np.inf
    max_ns: float = -np.inf
    histograms: list[Histogram] = field(default_factory=list)

    def add(self, duration_ns_V: Floats) -> None:
        self.count += len(duration_ns_V)
        self.sum_ns += float(duration_ns_V.sum())
        self.min_ns = min(self.min_ns, float(duration_ns_V.min()))
        self.max_ns = max(self.max_ns, float(duration_ns_V.max()))
        count_B = np.bincount(bin_of(duration_ns_V))
        bin_B = np.flatnonzero(count_B)
        self.histograms.append((bin_B, count_B[bin_B]))

    def histogram(self) -> Histogram:
        bins, counts = (np.concatenate(part) for part in zip(*self.histograms, strict=True))
        count_B = np.bincount(bins, counts).astype(np.int64)
        bin_B = np.flatnonzero(count_B)
        return bin_B, count_B[bin_B]


class Tally:
    """Takes whole rounds in any number of pieces."""

    def __init__(self) -> None:
        self.rows = 0
        self._series: defaultdict[SeriesKey, _Running] = defaultdict(_Running)
        self._nodes: dict[tuple[int, ...], NodeCounts] = {}
        self._phases: dict[tuple[int, ...], PhaseCounts] = {}

    def add(self, table: pa.Table) -> None:
        """Rows of `rounds`."""
        if not table.num_rows:
            return
        rows = RoundRows(table)
        self.rows += table.num_rows
        for measure in MEASURES:
            grouped = rows.grouped(measure)
            for key, duration_ns_V in [] if grouped is None else _pieces(measure, grouped):
                self._series[key].add(duration_ns_V)
        self._count(rows)

    def add_tokens(self, table: pa.Table) -> None:
        """Rows of `tokens`: policy, phase, orphaned."""
        key_R = table["policy"].to_numpy().astype(np.int64) * 2 + table["phase"].to_numpy()
        orphaned_R = table["orphaned"].to_numpy()
        for key in np.unique(key_R):
            counts = self._phase(*divmod(int(key), 2))
            counts.routed += int((key_R == key).sum())
            counts.orphaned += int(orphaned_R[key_R == key].sum())

    def series(self) -> Iterator[tuple[Series, Histogram]]:
        for key in sorted(self._series, key=_order):
            running = self._series[key]
            histogram = running.histogram()
            quantiles = quantiles_ns(*histogram, QUANTILES, running.min_ns, running.max_ns)
            figures = (running.sum_ns, running.min_ns, running.max_ns, *quantiles)
            yield Series(*key, running.count, *(round(ns, 3) for ns in figures)), histogram

    def nodes(self) -> list[NodeCounts]:
        return [self._nodes[key] for key in sorted(self._nodes)]

    def phases(self) -> list[PhaseCounts]:
        return [self._phases[key] for key in sorted(self._phases)]

    def _phase(self, policy: int, phase: int) -> PhaseCounts:
        return self._phases.setdefault((policy, phase), PhaseCounts(policy, phase))

    def _count(self, rows: RoundRows) -> None:
        status_R, waited = rows.column("status"), waits(rows)
        size = int(rows.group_R.max()) + 1
        requests_G, late_G, lost_G, last_G = (
            np.bincount(rows.group_R[chosen_R], minlength=size)
            for chosen_R in (rows.sent_R, status_R == Status.LATE, np.isin(status_R, LOST), waited.last_R)
        )
        alone_G = np.bincount(rows.group_R, waited.alone_ns_R, minlength=size)
        present_G = np.unique(rows.group_R)
        for group, key in zip(present_G, rows.keys(present_G).tolist(), strict=True):
            counts = self._nodes.setdefault(tuple(key), NodeCounts(*key))
            counts.requests += int(requests_G[group])
            counts.late += int(late_G[group])
            counts.lost += int(lost_G[group])
            counts.bottleneck += int(last_G[group])
            counts.alone_ns += float(alone_G[group])
        first_R = rows.device_R == 0
        for (policy, phase), count in _counted(rows.policy_R[first_R], rows.phase_R[first_R]):
            self._phase(policy, phase).rounds += count


def exact_series(rows: RoundRows, threads: int) -> list[Series]:
    """The same with quantiles of the rows themselves; `rows` are all of the run's."""

    def of(measure: Measure) -> list[Series]:
        grouped = rows.grouped(measure)
        return [] if grouped is None else [_exact(key, values) for key, values in _pieces(measure, grouped)]

    with ThreadPoolExecutor(threads) as pool:
        found = [series for part in pool.map(of, MEASURES) for series in part]
    return sorted(found, key=lambda s: _order((s.policy, s.phase, s.device, s.column)))


def _exact(key: SeriesKey, duration_ns_V: Floats) -> Series:
    sum_ns, min_ns, max_ns = float(duration_ns_V.sum()), float(duration_ns_V.min()), float(duration_ns_V.max())
    return Series(*key, len(duration_ns_V), sum_ns, min_ns, max_ns, *np.quantile(duration_ns_V, QUANTILES).tolist())


def _pieces(measure: Measure, grouped: Grouped) -> Iterator[tuple[SeriesKey, Floats]]:
    end_G = np.append(grouped.start_G, len(grouped.duration_ns_V))[1:]
    for (policy, phase, device), start, end in zip(grouped.key_G3.tolist(), grouped.start_G, end_G, strict=True):
        yield (policy, phase, device if measure.per_node else None, measure.column), grouped.duration_ns_V[start:end]


def _order(key: SeriesKey) -> tuple[Any, ...]:
    policy, phase, device, column = key
    return policy, phase, -1 if device is None else device, column


def _counted(policy_R: Ints, phase_R: Ints) -> Iterator[tuple[tuple[int, int], int]]:
    key_G, count_G = np.unique(policy_R * 2 + phase_R, return_counts=True)
    return zip((divmod(int(key), 2) for key in key_G), count_G.tolist(), strict=True)
