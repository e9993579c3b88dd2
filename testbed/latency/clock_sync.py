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


class _Floor:
    """Lower bounds of one quantity: of the offset (uplink messages) or of its negative (downlink messages)."""

    __slots__ = ("hard", "window")

    def __init__(self) -> None:
        self.hard: _Bound | None = None  # the strongest; it implies all others, because all age alike
        self.window: _Bound | None = None  # the strongest, along the drift, of the window under way

    def learn(self, bound: _Bound, drift: float, max_drift_ppb: int) -> None:
        hard, window = self.hard, self.window
        if hard is None:
            self.hard = bound
        elif bound.at_ns >= hard.at_ns:
            if bound.value_ns >= _at_least(hard, bound.at_ns, max_drift_ppb):
                self.hard = bound
        elif _at_least(bound, hard.at_ns, max_drift_ppb) >= hard.value_ns:
            self.hard = bound
        if window is None or bound.value_ns >= _likely(window, bound.at_ns, drift):
            self.window = bound

    def likely(self, best: _Bound, at_ns: int, drift: float) -> int:
        """Where the floor should be, by the window under way and the best of those before."""
        before = _likely(best, at_ns, drift)
        return before if self.window is None else max(before, _likely(self.window, at_ns, drift))


class ClockSync:
    """Offset and drift of ONE node's clock, learned from the stamps of rounds and heartbeats.

    max_drift_ppm: the most that one clock may gain on the other. 200 covers two free-running quartz clocks; a time
    daemon that slews CLOCK_MONOTONIC adds its own rate (the kernel's 500 ppm, chrony's `maxslewrate`).
    memory: windows of 2 s that the guess remembers. The interval remembers everything, in two numbers.
    resets: how often stamps contradicted what was known (another clock, a suspended machine, drift beyond the largest)
    and all that was older was forgotten. A step too small to contradict anything cannot be seen.
    """

    def __init__(self, max_drift_ppm: float = 200.0, memory: int = 32) -> None:
        if not 0 < max_drift_ppm < 1e6:
            raise ValueError(f"max_drift_ppm must be above 0 and below a million, not {max_drift_ppm}")
        if memory < WINDOWS_FOR_DRIFT:
            raise ValueError(f"memory must be at least {WINDOWS_FOR_DRIFT} windows, not {memory}")
        self.resets = 0
        self._max_drift_ppb = math.ceil(max_drift_ppm * 1000)
        self._windows: deque[tuple[_Bound, _Bound]] = deque(maxlen=memory)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the node has a new boot id. Not counted in `resets`."""
        self._offset, self._negative = _Floor(), _Floor()
        self._windows.clear()
        self._trend: _Trend | None = None
        self._window_end_ns: int | None = None
        self._newest_ns = 0

    def exchange(self, bs_sent_ns: int, node_received_ns: int, node_sent_ns: int, bs_received_ns: int) -> None:
        """Learn from a message to the node and one back: a round, or an echoed heartbeat.

        Raises ValueError if either clock ran backwards between its two stamps.
        """
        if bs_received_ns < bs_sent_ns or node_sent_ns < node_received_ns:
            raise ValueError(
                f"a reply before its request: BS sent {bs_sent_ns}, received {bs_received_ns}; "
                f"node received {node_received_ns}, sent {node_sent_ns}"
            )
        up = _Bound(node_sent_ns - bs_received_ns, bs_received_ns)
        self._learn(up, _Bound(bs_sent_ns - node_received_ns, bs_sent_ns))

    def one_way_up(self, node_sent_ns: int, bs_received_ns: int) -> None:
        """Learn from a message of the node alone: it bounds the offset from below only."""
        self._learn(_Bound(node_sent_ns - bs_received_ns, bs_received_ns), None)

    def reading(self, bs_now_ns: int) -> ClockReading | None:
        """The offset at a BS time, earlier ones included; None until both directions have been heard."""
        offset, negative, trend = self._offset, self._negative, self._trend
        if offset.hard is None or negative.hard is None:
            return None
        low_ns = _at_least(offset.hard, bs_now_ns, self._max_drift_ppb)
        high_ns = -_at_least(negative.hard, bs_now_ns, self._max_drift_ppb)
        guess_ns, drift_ppm = (low_ns + high_ns) // 2, math.nan
        if trend is not None:
            drift_ppm = trend.drift * 1e6
            likely_low_ns = offset.likely(trend.offset, bs_now_ns, trend.drift)
            likely_high_ns = -negative.likely(trend.negative, bs_now_ns, -trend.drift)
            if likely_low_ns <= likely_high_ns:  # or else the drift was not steady
                guess_ns = min(max((likely_low_ns + likely_high_ns) // 2, low_ns), high_ns)
        return ClockReading(guess_ns, low_ns, high_ns, drift_ppm, bs_now_ns - self._newest_ns)

    def one_way_times(
        self, bs_sent_ns: int, node_received_ns: int, node_sent_ns: int, bs_received_ns: int
    ) -> OneWayTimes | None:
        """Downlink and uplink time of an exchange, best after learning from it; None while the offset is unknown.

        Each direction uses the offset of its own moment; the offset given is that of bs_received_ns.
        """
        then, now = self.reading(bs_sent_ns), self.reading(bs_received_ns)
        if then is None or now is None:
            return None
        down_ns = max(node_received_ns - bs_sent_ns - then.offset_ns, 0)
        up_ns = max(bs_received_ns - node_sent_ns + now.offset_ns, 0)
        return OneWayTimes(down_ns, up_ns, now.offset_ns, max(then.bound_ns, now.bound_ns))

    def _learn(self, up: _Bound, down: _Bound | None) -> None:
        offset, negative, max_drift_ppb = self._offset, self._negative, self._max_drift_ppb
        stepped_between = down is not None and _contradict(up, down, max_drift_ppb)
        if (
            stepped_between
            or _contradict(up, negative.hard, max_drift_ppb)
            or (down is not None and _contradict(down, offset.hard, max_drift_ppb))
        ):
            self.reset()
            self.resets += 1
        self._turn_window(up.at_ns)
        drift = 0.0 if self._trend is None else self._trend.drift
        self._offset.learn(up, drift, max_drift_ppb)
        if down is not None and not stepped_between:
            self._negative.learn(down, -drift, max_drift_ppb)
        self._newest_ns = max(self._newest_ns, up.at_ns)

    def _turn_window(self, now_ns: int) -> None:
        """Close the window at its end, but not before it has heard both directions: one alone tells no drift."""
        offset, negative = self._offset, self._negative
        if self._window_end_ns is None:
            self._window_end_ns = now_ns + WINDOW_NS
        elif now_ns >= self._window_end_ns and offset.window is not None and negative.window is not None:
            self._windows.append((offset.window, negative.window))
            offset.window = negative.window = None
            self._window_end_ns = now_ns + WINDOW_NS
            if len(self._windows) >= WINDOWS_FOR_DRIFT:
                self._trend = _trend(self._windows, self._max_drift_ppb / 1e9)


def _at_least(bound: _Bound, at_ns: int, max_drift_ppb: int) -> int:
    """What the bound still says at another time, whatever the clocks did between."""
    return bound.value_ns + -abs(at_ns - bound.at_ns) * max_drift_ppb // 1_000_000_000


def _likely(bound: _Bound, at_ns: int, drift: float) -> int:
    """What it says if the drift was as estimated."""
    return bound.value_ns + round(drift * (at_ns - bound.at_ns))


def _contradict(bound: _Bound, opposite: _Bound | None, max_drift_ppb: int) -> bool:
    """Whether a quantity and its negative cannot both be that large."""
    return opposite is not None and bound.value_ns + _at_least(opposite, bound.at_ns, max_drift_ppb) > 0


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
