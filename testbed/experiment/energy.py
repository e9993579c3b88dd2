"""Energy from the power that a board measured: a trapezoid over its samples, with what it draws at rest taken off.

Only for devices that report power. Of an emulated device (dilated, padded, `as_if`) it would be this machine's energy,
not the device's; and of a virtual or emulated one there is no power at all: then the answers are None, never 0.

S samples of one device, B intervals in which it was busy. All stamps in ns, on one clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Stamps = NDArray[np.int64]

LEAST_SAMPLES = 5  # within a window, or at rest: fewer say too little
MOST_INTERVALS = 3.0  # between two samples that follow each other: one lost is filled in, more are not


class Power(NamedTuple):
    """What is known of a device's power: ascending stamps, W at each of them, and the interval they should have."""

    time_ns_S: Stamps
    power_w_S: Floats
    interval_s: float

    @classmethod
    def of(cls, time_ns_S: ArrayLike, power_w_S: ArrayLike, interval_s: float) -> Power:
        """Samples as they were logged; one without a power (None, NaN) is left out, and so becomes a gap.

        Raises ValueError where lengths differ, stamps do not ascend, a power is below 0 or the interval not above 0.
        """
        time_ns, power_w = np.asarray(time_ns_S, np.int64), np.asarray(power_w_S, np.float64)
        if time_ns.ndim != 1 or time_ns.shape != power_w.shape:
            raise ValueError(f"a stamp for every power: {time_ns.shape} and {power_w.shape}")
        if np.any(np.diff(time_ns) <= 0):
            raise ValueError("stamps must ascend")
        if np.any(power_w < 0) or not interval_s > 0:
            raise ValueError("power must be 0 or above, and the interval above 0 s")
        known_S = np.isfinite(power_w)
        return cls(time_ns[known_S], power_w[known_S], interval_s)


@dataclass(frozen=True, slots=True)
class MeasuredEnergy:
    """Measured energy of one device in a window. None where it is not known."""

    total_j: float
    idle_w: float | None  # what was subtracted, for the whole window
    above_idle_j: float | None  # total_j - idle_w * window; below 0 where noise is all there is
    samples: int  # within the window
    covered_s: float  # of the window, between samples; before the first and after the last their power was held

    def joule_per_token(self, tokens: int) -> float | None:
        """above_idle_j / tokens, those that the run put through in the window; None without either."""
        return None if self.above_idle_j is None or tokens <= 0 else self.above_idle_j / tokens


def idle_power_w(
    power: Power, busy_from_ns_B: ArrayLike, busy_to_ns_B: ArrayLike, settle_s: float | None = None
) -> float | None:
    """Median power of the samples at rest, W; None with fewer than LEAST_SAMPLES of them.

    At rest is a sample before the first busy interval or later than settle_s (two sampling intervals, unless told
    otherwise) after the end of the last one: a sample is a mean over the time before it. Intervals may overlap.
    Raises ValueError where one ends before it began.
    """
    start_ns, end_ns = np.asarray(busy_from_ns_B, np.int64), np.asarray(busy_to_ns_B, np.int64)
    if start_ns.shape != end_ns.shape or np.any(end_ns < start_ns):
        raise ValueError("a busy interval must have an end, after its start")
    settle_ns = 1e9 * (2 * power.interval_s if settle_s is None else settle_s)
    order = np.argsort(start_ns)
    last_end_ns_B = np.maximum.accumulate(end_ns[order])
    begun_S = np.searchsorted(start_ns[order], power.time_ns_S, side="right")  # busy intervals begun by then
    rest_S = begun_S == 0
    rest_S[~rest_S] = power.time_ns_S[~rest_S] - last_end_ns_B[begun_S[~rest_S] - 1] > settle_ns
    return float(np.median(power.power_w_S[rest_S])) if rest_S.sum() >= LEAST_SAMPLES else None


def measured_energy(power: Power, start_ns: int, end_ns: int, idle_w: float | None) -> MeasuredEnergy | None:
    """Energy from start_ns to end_ns, by the trapezoid rule, the power at both ends being interpolated.

    None where that is not known: fewer than LEAST_SAMPLES within the window, or a gap of more than MOST_INTERVALS
    sampling intervals within it or towards one of its ends. Raises ValueError where the window is empty.
    """
    if end_ns <= start_ns:
        raise ValueError("a window must end after its start")
    time_ns_S = power.time_ns_S
    inside_S = (time_ns_S >= start_ns) & (time_ns_S <= end_ns)
    if (
        inside_S.sum() < LEAST_SAMPLES
        or _largest_gap_s(time_ns_S, start_ns, end_ns) > MOST_INTERVALS * power.interval_s
    ):
        return None
    stamps_ns = np.unique(np.concatenate([[start_ns], time_ns_S[inside_S], [end_ns]]))
    power_w = np.interp(_seconds(stamps_ns, start_ns), _seconds(time_ns_S, start_ns), power.power_w_S)
    total_j = float(np.sum(np.diff(_seconds(stamps_ns, start_ns)) * (power_w[1:] + power_w[:-1]) / 2))
    covered_ns = min(end_ns, int(time_ns_S[-1])) - max(start_ns, int(time_ns_S[0]))
    above_idle_j = None if idle_w is None else total_j - idle_w * (end_ns - start_ns) / 1e9
    return MeasuredEnergy(total_j, idle_w, above_idle_j, int(inside_S.sum()), covered_ns / 1e9)


def _largest_gap_s(time_ns_S: Stamps, start_ns: int, end_ns: int) -> float:
    """Between neighbouring samples from the last before the window to the first after it, or to its end if none is."""
    first = max(int(np.searchsorted(time_ns_S, start_ns, side="right")) - 1, 0)
    last = int(np.searchsorted(time_ns_S, end_ns, side="left")) + 1
    near_ns = time_ns_S[first:last]
    ends_ns = [min(start_ns, int(near_ns[0]))], near_ns, [max(end_ns, int(near_ns[-1]))]
    return float(np.diff(np.concatenate(ends_ns)).max() / 1e9)


def _seconds(time_ns: Stamps, since_ns: int) -> Floats:
    """Differences first: a stamp in ns has more digits than a float."""
    return np.asarray((time_ns - since_ns) / 1e9, np.float64)
