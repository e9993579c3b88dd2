"""The offset between the BS's monotonic clock and one node's: a hard interval, and a best guess inside it.

A message cannot arrive before it was sent. So one from the BS bounds the offset from above (node_received - bs_sent)
and one from the node from below (node_sent - bs_received), whatever the link's asymmetry, serialisation, queueing or a
loop that was not polling. Both bounds age by at most the largest drift; nothing else is assumed by the interval.
The guess also assumes that the quickest messages take equally long in both directions and that drift is steady for a
minute. It is the minimum-delay filter of Cristian and NTP, taken per direction, along the drift at which the quickest
messages fit best (Moon, Skelly and Towsley, INFOCOM 1999, here for both directions at once).

Pure: the caller brings every stamp, in integer nanoseconds.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.latency import clock_kernels as kernels
from testbed.latency.clock_kernels import AT, BEFORE, DOWN, MAX_DRIFT_PPB, NOTHING, RESETS, UP, VALUE, WINDOW

WINDOW_NS = 2_000_000_000
WINDOWS_FOR_DRIFT = 4
SCATTER = 0.25  # drift is told once the bounds' scatter over their span is below this share of the largest drift


class ClockReading(NamedTuple):
    """What is known of a node's clock at one BS time: offset = node clock - BS clock.

    The true offset is in [low_ns, high_ns], and so is the guess offset_ns. drift_ppm: how fast the offset grows, NaN
    while unknown. age_ns: BS time since the newest stamp, negative if an earlier time was asked for.
    """

    offset_ns: int
    low_ns: int
    high_ns: int
    drift_ppm: float
    age_ns: int

    @property
    def bound_ns(self) -> int:
        """The largest error that offset_ns can have."""
        return max(self.high_ns - self.offset_ns, self.offset_ns - self.low_ns)


class OneWayTimes(NamedTuple):
    """Times of both directions of one exchange; each true time is within bound_ns of what stands here.

    Counted as the node's clock counts, which differs from the BS's count by the drift: at most a few ten-thousandths.
    """

    down_ns: int
    up_ns: int
    offset_ns: int
    bound_ns: int


class _Bound(NamedTuple):
    """At BS time at_ns the quantity was at least value_ns."""

    value_ns: int
    at_ns: int


class _Trend(NamedTuple):
    """The steady drift (a ratio), and the strongest bound of each direction along it."""

    drift: float
    offset: _Bound
    negative: _Bound


class Clocks:
    """The clocks of N nodes, side by side, so that all exchanges of a round are learnt from in one pass.

    max_drift_ppm: the most that one clock may gain on the other. 200 covers two free-running quartz clocks; a time
    daemon that slews CLOCK_MONOTONIC adds its own rate (the kernel's 500 ppm, chrony's `maxslewrate`).
    memory: windows of 2 s that the guess remembers. The interval remembers everything, in two numbers.
    """

    def __init__(self, nodes: int, max_drift_ppm: float = 200.0, memory: int = 32) -> None:
        if not 0 < max_drift_ppm < 1e6:
            raise ValueError(f"max_drift_ppm must be above 0 and below a million, not {max_drift_ppm}")
        if memory < WINDOWS_FOR_DRIFT:
            raise ValueError(f"memory must be at least {WINDOWS_FOR_DRIFT} windows, not {memory}")
        self._bound_NDK2 = np.zeros((nodes, 2, 3, 2), np.int64)
        self._facts_NF = np.zeros((nodes, kernels.FACTS), np.int64)
        self._facts_NF[:, MAX_DRIFT_PPB] = math.ceil(max_drift_ppm * 1000)
        self._drift_N = np.zeros(nodes)
        self._windows_N: list[deque[tuple[_Bound, _Bound]]] = [deque(maxlen=memory) for _ in range(nodes)]
        self._windows_of_N = [0] * nodes  # resets there had been when these windows closed
        self.of_N = [ClockSync(self, node) for node in range(nodes)]
        for node in range(nodes):
            self.reset(node)

    def exchanges(self, node_B: NDArray[np.int64], stamps_B4: NDArray[np.int64]) -> NDArray[np.int64]:
        """Learn from B exchanges, in their order, and say each one's one-way times as it is then known.

        stamps_B4: BS sent, node received, node sent, BS received. ways_B4: down, up, offset and its bound, in ns, all
        NOTHING where the offset is unknown. Raises ValueError if a clock ran backwards between two stamps.
        """
        ways_B4 = np.empty((len(node_B), 4), np.int64)
        done, state = 0, (self._bound_NDK2, self._facts_NF, self._drift_N)
        while (done := kernels.exchanges(*state, node_B, stamps_B4, done, WINDOW_NS, ways_B4)) < len(node_B):
            if done < 0:
                raise ValueError(_cannot_be(*stamps_B4[-1 - done].tolist()))
            self._turn_window(int(node_B[done]), int(stamps_B4[done, 3]))
        return ways_B4

    def one_way_up(self, node: int, node_sent_ns: int, bs_received_ns: int) -> None:
        """Learn from a message of the node alone: it bounds the offset from below only."""
        if max(abs(node_sent_ns), abs(bs_received_ns)) >= kernels.LATEST_NS:
            raise ValueError(f"no time of this century: node sent {node_sent_ns}, BS received {bs_received_ns}")
        state = self._bound_NDK2, self._facts_NF, self._drift_N
        while not kernels.one_way_up(*state, node, node_sent_ns, bs_received_ns, WINDOW_NS):
            self._turn_window(node, bs_received_ns)

    def one_way_times(self, node: int, stamps: tuple[int, int, int, int]) -> OneWayTimes | None:
        """Downlink and uplink time of an exchange, best after learning from it; None while the offset is unknown."""
        ways_4 = np.empty(4, np.int64)
        kernels.one_way_times(self._bound_NDK2, self._facts_NF, self._drift_N, node, np.array(stamps, np.int64), ways_4)
        return None if ways_4[0] == NOTHING else OneWayTimes(*ways_4.tolist())

    def reading(self, node: int, bs_now_ns: int) -> ClockReading | None:
        """The offset at a BS time, earlier ones included; None until both directions have been heard."""
        reading_4 = np.empty(4, np.int64)
        if not kernels.reading(self._bound_NDK2, self._facts_NF, self._drift_N, node, bs_now_ns, reading_4):
            return None
        offset_ns, low_ns, high_ns, age_ns = reading_4.tolist()
        steady = self._bound_NDK2[node, UP, BEFORE, VALUE] != NOTHING
        return ClockReading(
            offset_ns, low_ns, high_ns, float(self._drift_N[node] * 1e6) if steady else math.nan, age_ns
        )

    def reset(self, node: int) -> None:
        """Forget everything: the node has a new boot id. Not counted in `resets`."""
        kernels.reset(self._bound_NDK2, self._facts_NF, node)
        self._windows_N[node].clear()

    def resets(self, node: int) -> int:
        """How often stamps contradicted what was known (another clock, a suspended machine, drift beyond the largest)
        and all that was older was forgotten. A step too small to contradict anything cannot be seen."""
        return int(self._facts_NF[node, RESETS])

    def _turn_window(self, node: int, now_ns: int) -> None:
        """Close the window under way; with enough of them the drift shows."""
        windows, bound_DK2, resets = self._windows_N[node], self._bound_NDK2[node], self.resets(node)
        if self._windows_of_N[node] != resets:
            windows.clear()
            self._windows_of_N[node] = resets
        windows.append((_Bound(*bound_DK2[UP, WINDOW].tolist()), _Bound(*bound_DK2[DOWN, WINDOW].tolist())))
        bound_DK2[:, WINDOW, VALUE] = NOTHING
        self._facts_NF[node, kernels.WINDOW_END] = now_ns + WINDOW_NS
        if len(windows) >= WINDOWS_FOR_DRIFT:
            trend = _trend(windows, self._facts_NF[node, MAX_DRIFT_PPB] / 1e9)
            bound_DK2[:, BEFORE, VALUE] = NOTHING
            if trend is not None:
                self._drift_N[node] = trend.drift
                for direction, bound in ((UP, trend.offset), (DOWN, trend.negative)):
                    bound_DK2[direction, BEFORE, VALUE], bound_DK2[direction, BEFORE, AT] = bound


class ClockSync:
    """Offset and drift of ONE node's clock, learned from the stamps of rounds and heartbeats. A view of `Clocks`."""

    __slots__ = ("_clocks", "_node")

    def __init__(self, clocks: Clocks | None = None, node: int = 0) -> None:
        self._clocks, self._node = clocks or Clocks(1), node

    @property
    def resets(self) -> int:
        return self._clocks.resets(self._node)

    def reset(self) -> None:
        self._clocks.reset(self._node)

    def exchange(self, bs_sent_ns: int, node_received_ns: int, node_sent_ns: int, bs_received_ns: int) -> None:
        """Learn from a message to the node and one back: a round, or an echoed heartbeat. Raises ValueError."""
        stamps = bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns
        if max(map(abs, stamps)) >= kernels.LATEST_NS:
            raise ValueError(_cannot_be(*stamps))
        stamps_14 = np.array([stamps], np.int64)
        self._clocks.exchanges(np.array([self._node]), stamps_14)

    def one_way_up(self, node_sent_ns: int, bs_received_ns: int) -> None:
        self._clocks.one_way_up(self._node, node_sent_ns, bs_received_ns)

    def reading(self, bs_now_ns: int) -> ClockReading | None:
        return self._clocks.reading(self._node, bs_now_ns)

    def one_way_times(
        self, bs_sent_ns: int, node_received_ns: int, node_sent_ns: int, bs_received_ns: int
    ) -> OneWayTimes | None:
        return self._clocks.one_way_times(self._node, (bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns))


def _cannot_be(bs_sent_ns: int, node_received_ns: int, node_sent_ns: int, bs_received_ns: int) -> str:
    return (
        f"a reply before its request, or no time of this century: BS sent {bs_sent_ns}, received {bs_received_ns}; "
        f"node received {node_received_ns}, sent {node_sent_ns}"
    )


def _trend(windows: deque[tuple[_Bound, _Bound]], max_drift: float) -> _Trend | None:
    """The drift that leaves the widest gap between all lower and all upper bounds; None where they scatter too much.

    At the true drift the gap is the quickest message's time in both directions; at a wrong one the bounds run into each
    other. Slower messages lie outside and do not matter. The gap is a concave, piecewise linear function of the drift,
    so its peak is found exactly, by cutting it off with tangents from both sides.
    """
    now_ns, origin_ns = windows[-1][0].at_ns, windows[-1][0].value_ns
    low = [(offset.at_ns - now_ns, offset.value_ns - origin_ns) for offset, _ in windows]
    high = [(negative.at_ns - now_ns, -negative.value_ns - origin_ns) for _, negative in windows]
    left, right = _Tangent(low, high, -max_drift), _Tangent(low, high, max_drift)
    best = left if left.slope <= 0 else right
    while left.slope > 0 > right.slope:
        best = _Tangent(low, high, (right.gap_at_0 - left.gap_at_0) / (left.slope - right.slope))
        if not right.slope < best.slope < left.slope or best.slope == 0:
            break
        left, right = (best, right) if best.slope > 0 else (left, best)
    span_ns = now_ns - windows[0][0].at_ns
    if median(best.scatter()) > SCATTER * max_drift * span_ns:
        return None
    return _Trend(best.drift, windows[best.lowest][0], windows[best.highest][1])


class _Tangent:
    """The gap between lower and upper bounds, (BS time, offset) each, as the line in drift that touches it at one."""

    def __init__(self, low: list[tuple[int, int]], high: list[tuple[int, int]], drift: float) -> None:
        self.drift = drift
        self._below = [value - drift * at for at, value in low]
        self._above = [value - drift * at for at, value in high]
        self._top, self._bottom = max(self._below), min(self._above)
        self.lowest, self.highest = self._below.index(self._top), self._above.index(self._bottom)
        self.slope = low[self.lowest][0] - high[self.highest][0]
        self.gap_at_0 = self._bottom - self._top - self.slope * drift

    def scatter(self) -> list[float]:
        """How far each bound lies outside the gap."""
        return [self._top - value for value in self._below] + [value - self._bottom for value in self._above]
