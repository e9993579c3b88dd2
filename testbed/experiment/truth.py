"""What the emulated links really did in every round: the relay's own record beside the base station's rows.

For results and tests alone: base station, estimator and policies never see it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from testbed.channel.record import DOWN, UP
from testbed.runlog.reader import read_parquet

RECORD = "links.parquet"
COLUMNS = ("device", "rows", "bs_sent_ns", "node_received_ns", "node_sent_ns", "bs_received_ns")
Ints = NDArray[np.int64]


class LinkTruth(NamedTuple):
    """One value per row of `rounds`; NaN where nothing was sent or no reply came. Nanoseconds, real ones."""

    down_ns: NDArray[np.float64]  # first part handed to the socket until the last left the relay
    up_ns: NDArray[np.float64]  # reply handed to the socket until its last part left the relay
    down_air_ns: NDArray[np.float64]  # what the channel alone asked for, turns of others on the same air included
    up_air_ns: NDArray[np.float64]


def link_truth(run_dir: Path, rounds: pa.Table, *, shared: bool = False) -> LinkTruth | None:
    """The record joined to `rounds` by time: a link carries one block at a time. None where links were not emulated.

    Relay and nodes are on one machine and read one clock.
    """
    if not (run_dir / RECORD).exists():
        return None
    frames = read_parquet(run_dir / RECORD)
    truth = LinkTruth(*(np.full(rounds.num_rows, np.nan) for _ in LinkTruth._fields))
    column = {name: rounds[name].to_numpy() for name in COLUMNS}
    for device in np.unique(column["device"]):
        mine = np.flatnonzero((column["device"] == device) & (column["rows"] > 0) & ~np.isnan(column["bs_received_ns"]))
        sent_ns, received_ns = column["bs_sent_ns"][mine], column["bs_received_ns"][mine]
        node_received_ns, node_sent_ns = column["node_received_ns"][mine], column["node_sent_ns"][mine]
        down, up = (_Direction(frames, int(device), direction) for direction in (DOWN, UP))
        truth.down_ns[mine] = down.last_out_ns(sent_ns, node_received_ns) - sent_ns
        truth.up_ns[mine] = up.last_out_ns(node_sent_ns, received_ns) - node_sent_ns
        truth.down_air_ns[mine] = down.air_ns(sent_ns, node_received_ns, shared)
        truth.up_air_ns[mine] = up.air_ns(node_sent_ns, received_ns, shared)
    return truth


class _Direction:
    """The frames of one direction of one link, in the order in which they entered it."""

    def __init__(self, frames: pa.Table, device: int, direction: int) -> None:
        chosen = (frames["device"].to_numpy() == device) & (frames["direction"].to_numpy() == direction)
        order = np.argsort(frames["first_in_ns"].to_numpy()[chosen], kind="stable")
        self._in_ns, self._out_ns, self._air_end_ns, air_ns = (
            frames[name].to_numpy()[chosen][order] for name in ("first_in_ns", "out_ns", "air_end_ns", "air_ns")
        )
        self._air_before_ns = np.concatenate([[0.0], np.cumsum(air_ns)])

    def _between(self, from_ns: Ints, until_ns: Ints) -> tuple[Ints, Ints]:
        """Frames that entered after `from_ns` and were out before `until_ns`: heartbeats may follow a reply closely."""
        return np.searchsorted(self._in_ns, from_ns), np.searchsorted(self._out_ns, until_ns, "right")

    def last_out_ns(self, from_ns: Ints, until_ns: Ints) -> NDArray[np.float64]:
        first, after = self._between(from_ns, until_ns)
        out_ns = np.concatenate([[np.nan], self._out_ns])
        return np.where(after > first, out_ns[after], np.nan)

    def air_ns(self, from_ns: Ints, until_ns: Ints, shared: bool) -> NDArray[np.float64]:
        first, after = self._between(from_ns, until_ns)
        own_ns: NDArray[np.float64] = self._air_before_ns[after] - self._air_before_ns[first]
        if not shared:
            return own_ns
        in_ns, end_ns = np.append(self._in_ns, 0), np.concatenate([[0], self._air_end_ns])
        return np.where(after > first, end_ns[after] - in_ns[first], 0.0)
