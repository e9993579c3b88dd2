"""The simplest estimate of a device's latency: a forgetting mean of its measured seconds per token."""

from __future__ import annotations

import math

import numpy as np

from testbed.policies.base import BoolArray, FloatArray, IntArray, State

PREFILL, DECODE = 0, 1


class RunningMean:
    """Mean seconds per token of each device and phase: down, compute and up, as a round really took.

    Each lesson (one round's seconds / rows) counts alike. The first `memory` lessons make a plain mean; from then on
    each new one weighs 1 / memory and older ones fade exponentially. Prefill and decode are kept apart, because one
    row alone costs more than its share of many: in prefill the mean is that share, only near Eq. 6's one token alone.
    Pure: the caller brings the time (seconds on one monotonic clock).
    """

    def __init__(self, devices: int, memory: int = 32) -> None:
        if devices < 1 or memory < 1:
            raise ValueError(f"devices and memory must be at least 1, not {devices} and {memory}")
        self.mean_s_PN: FloatArray = np.full((2, devices), np.nan)
        self.lessons_PN: IntArray = np.zeros((2, devices), np.int64)
        self.taught_at_s_PN: FloatArray = np.full((2, devices), np.nan)
        self._memory = memory
        self._zero_N = np.zeros(devices)
        self._zero_N.flags.writeable = False

    def teach(self, device: int, phase: int, rows: int, seconds: float, now_s: float) -> None:
        """Learn that `rows` tokens took `seconds` on `device`. Raises ValueError for what cannot be a measurement."""
        if rows < 1 or not 0 < seconds < math.inf:
            raise ValueError(f"device {device}: {rows} rows in {seconds} s is no measurement")
        if phase not in (PREFILL, DECODE) or not 0 <= device < len(self._zero_N):
            raise ValueError(f"no device {device} or no phase {phase} (0 prefill, 1 decode)")
        lessons = self.lessons_PN[phase, device] + 1
        mean_s = self.mean_s_PN[phase, device] if lessons > 1 else 0.0
        self.mean_s_PN[phase, device] = mean_s + (seconds / rows - mean_s) / min(lessons, self._memory)
        self.lessons_PN[phase, device] = lessons
        self.taught_at_s_PN[phase, device] = now_s

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State:
        """What a policy may know in `phase`, as values of its own: later lessons do not change it.

        A device without a lesson in this phase is known by the other phase's mean and age; without any it is NaN. One
        row costs token_s whatever else is sent: a mean cannot tell a round's fixed cost from the cost of its rows.
        """
        own_N = self.lessons_PN[phase] > 0
        token_s_N, taught_at_s_N = self.mean_s_PN[phase].copy(), self.taught_at_s_PN[phase]
        if not own_N.all():
            token_s_N = np.where(own_N, token_s_N, self.mean_s_PN[1 - phase])
            taught_at_s_N = np.where(own_N, taught_at_s_N, self.taught_at_s_PN[1 - phase])
        return State(token_s_N, available_N.copy(), now_s - taught_at_s_N, self._zero_N, self._zero_N, token_s_N)
