"""The rows of `rounds` as a summary needs them: durations by (policy, phase, node), and who kept a round waiting.

R rows, V known durations, G groups (policy, phase, node), Q rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.runlog.histogram import Floats, Ints
from testbed.runlog.reader import to_table
from testbed.runlog.schema import PARQUET, PHASES, SEGMENT, Status
from testbed.runlog.segment import read_segment

ROWS_AT_ONCE = 2**20


class Measure(NamedTuple):
    """One kind of duration. `stretched` ones are divided by the dilation; the base station's own compute is not."""

    column: str
    per_node: bool  # else the same in every device's row: counted once per round
    stretched: bool


def is_stretched(column: str) -> bool:
    """Links, nodes and the wait for them take emulated time; what the base station computes is its own."""
    return column == "wait_ns" or not any(phase.column == column and phase.where == "BS" for phase in PHASES)


MEASURES = (
    *(
        Measure(phase.column, phase.where != "BS" or phase.name == "send", is_stretched(phase.column))
        for phase in PHASES
        if phase.column is not None
    ),
    *(Measure(column, True, True) for column in ("node_padding_ns", "rtt_ns", "clock_bound_ns")),
    Measure("round_ns", False, True),
)
NEEDED = {"round", "policy", "phase", "device", "rows", "status", "bs_sent_ns", "bs_received_ns"}
COLUMNS = tuple(sorted({*NEEDED, "dilation", *(measure.column for measure in MEASURES)}))


def log_parts(run_dir: Path, table: str) -> list[Path]:
    """The files that hold a table, in order; a segment counts as long as it exists. Raises RunLogError for a gap."""
    parts = {path.stem: path for end in (PARQUET, SEGMENT) for path in run_dir.glob(f"{table}-*{end}")}
    absent = {f"{table}-{number:04d}" for number in range(len(parts))} - set(parts)
    if absent:
        raise RunLogError(f"{run_dir / min(absent)}: this part of the log is missing; restore it from a copy")
    return [parts[name] for name in sorted(parts, key=lambda name: (len(name), name))]


def batches(parts: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Those of the columns that there are, of about a million rows at a time; a round is never cut in two."""
    held: list[pa.Table] = []
    for path in parts:
        held.append(_read(path, columns))
        if sum(table.num_rows for table in held) >= ROWS_AT_ONCE:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


class LogRows:
    """All rows of some parts of a log; a column is read when it is asked for."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = parts
        self.names: list[str] = _names(parts[0])

    def __getitem__(self, name: str) -> Any:
        return pa.concat_tables([_read(path, (name,)) for path in self._parts])[name]

    @property
    def column_names(self) -> list[str]:
        return self.names


def _names(path: Path) -> list[str]:
    if path.suffix == SEGMENT:
        return list(read_segment(path).records.dtype.names or ())
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        if path.suffix == SEGMENT:
            header, records, missing, _ = read_segment(path)
            if missing:
                warnings.warn(f"{path}: {missing} rows never reached the disk, or not whole", stacklevel=2)
            return to_table(header, records[[name for name in columns if name in (records.dtype.names or ())]])
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read([name for name in columns if name in file.schema_arrow.names])
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RunLogError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return RunLogError(f"{path}: cannot be read ({reason}); restore it from a copy")


class Grouped(NamedTuple):
    """Durations in the order of their groups."""

    key_G3: Ints  # policy, phase, device
    start_G: Ints
    duration_ns_V: Floats


class RoundRows:
    """Rows of whole rounds, grouped by policy, phase and node."""

    def __init__(self, table: pa.Table | LogRows) -> None:
        self._table = table
        self.policy_R, self.phase_R, self.device_R = (
            self.column(name).astype(np.int64) for name in ("policy", "phase", "device")
        )
        self._shape = tuple(int(part_R.max()) + 1 for part_R in (self.policy_R, self.phase_R, self.device_R))
        self.group_R: Ints = np.ravel_multi_index((self.policy_R, self.phase_R, self.device_R), self._shape)
        self.dilation_R: Floats = np.ones(len(self.group_R))
        if "dilation" in table.column_names:  # older runs knew of none
            dilation_R = self.column("dilation").astype(float)
            np.copyto(self.dilation_R, dilation_R, where=(dilation_R > 0) & (dilation_R < np.inf))
        self.sent_R: NDArray[np.bool_] = self.column("rows") > 0
        self._order = {True: self._by_group(self.sent_R), False: self._by_group(self.device_R == 0)}

    def column(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self._table[name].to_numpy()
        return values

    def keys(self, group_G: Ints) -> Ints:
        """key_G3: policy, phase and device of these groups."""
        return np.column_stack(np.unravel_index(group_G, self._shape))

    def grouped(self, measure: Measure) -> Grouped | None:
        """Its known durations, those of emulated time without dilation; None where the rows have no such column."""
        if measure.column not in self._table.column_names:
            return None
        order = self._order[measure.per_node]
        duration_V, group_V = self._duration_ns(measure, order), self.group_R[order]
        known_V = ~np.isnan(duration_V)
        if not known_V.all():
            duration_V, group_V = duration_V[known_V], group_V[known_V]
        start_G = np.flatnonzero(np.diff(group_V, prepend=-1))
        return Grouped(self.keys(group_V[start_G]), start_G, duration_V)

    def _duration_ns(self, measure: Measure, order: Ints) -> Floats:
        duration_V: Floats = self.column(measure.column)[order].astype(float)
        return duration_V / self.dilation_R[order] if measure.stretched else duration_V

    def _by_group(self, chosen_R: NDArray[np.bool_]) -> Ints:
        chosen = np.flatnonzero(chosen_R)
        group = self.group_R[chosen]
        small = group.astype(np.uint16) if np.prod(self._shape) <= 2**16 else group  # sorts several times faster
        return chosen[np.argsort(small, kind="stable")]


class Waits(NamedTuple):
    """Per row: did the round wait for this node last, and how long for it alone (emulated ns)."""

    last_R: NDArray[np.bool_]
    alone_ns_R: Floats


def waits(rows: RoundRows) -> Waits:
    """A node is a round's bottleneck where its reply came last, or not in time; of several late ones, each is.

    It was waited for alone since the reply before its own, or since the first request where no other node was asked.
    """
    start_Q = np.flatnonzero(np.diff(rows.column("round").astype(np.int64), prepend=-1))
    length_Q = np.diff(start_Q, append=len(rows.sent_R))
    late_R = rows.column("status") == Status.LATE
    late_Q = np.logical_or.reduceat(late_R, start_Q)
    received_R = np.where(rows.sent_R, np.nan_to_num(rows.column("bs_received_ns"), nan=-np.inf), -np.inf)
    newest_R = np.repeat(np.maximum.reduceat(received_R, start_Q), length_Q)
    last_R = (received_R == newest_R) & np.isfinite(received_R) & ~np.repeat(late_Q, length_Q)
    before_Q = np.maximum.reduceat(np.where(last_R, -np.inf, received_R), start_Q)
    sent_R = np.where(rows.sent_R, np.nan_to_num(rows.column("bs_sent_ns"), nan=np.inf), np.inf)
    since_Q = np.where(np.isfinite(before_Q), before_Q, np.minimum.reduceat(sent_R, start_Q))
    alone_ns_R = np.zeros(len(last_R))
    alone_ns_R[last_R] = (received_R - np.repeat(since_Q, length_Q))[last_R] / rows.dilation_R[last_R]
    alone_ns_R[~np.isfinite(alone_ns_R)] = 0.0
    return Waits(last_R | late_R, alone_ns_R)
