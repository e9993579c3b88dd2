"""What every device's next round will cost, learnt online from what earlier ones did.

Per device: compute = c0 + c1 * experts touched + c2 * rows; a link, per direction, = l0 + l1 * bytes; nothing is
negative. Only measurements teach (`fit.py` says how); the true channel is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np

from testbed.latency.fit import HELD, NOISE, START_NOISE, token_costs
from testbed.latency.lessons import LONGEST_S, Floats, Ints, teach_all
from testbed.policies.base import BoolArray, FloatArray, State

NO_RATIO = np.ones((1, 2))
DOUBT_OF_RETURNED = 100.0  # growth of all variances of a device that comes back as another process


class Lesson(NamedTuple):
    """One answered block as it was measured. Seconds that are not known are NaN.

    compute_s: its residence on the node, by the node's clock: dequantise, compute, quantise. down_s, up_s: one way
    each, where the clocks are synchronised; else link_s: both ways together, RTT less residence.
    """

    rows: int
    experts: int
    bytes_down: int
    bytes_up: int
    compute_s: float
    down_s: float = nan
    up_s: float = nan
    link_s: float = nan


class Prediction(NamedTuple):
    """Seconds of one block on one device; NaN while nothing is known of it."""

    compute_s: float
    down_s: float
    up_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.down_s + self.up_s


class Estimator:
    """Learns N devices. Pure: the caller brings the time, in seconds on one monotonic clock.

    row_bytes_down, row_bytes_up: what one more row adds to a block on the wire; header_bytes: what a block has besides.
    memory_rounds: a device's older lessons fade beyond these many. Methods raise ValueError for what is not a device.
    """

    def __init__(
        self,
        devices: int,
        row_bytes_down: int,
        row_bytes_up: int,
        *,
        header_bytes: int = 100,
        memory_rounds: int = 32,
    ) -> None:
        if min(devices, row_bytes_down, row_bytes_up, memory_rounds) < 1 or header_bytes < 0:
            raise ValueError("devices, bytes of a row and memory_rounds must be at least 1, header_bytes at least 0")
        self.lessons_N: Ints = np.zeros(devices, np.int64)
        self.taught_at_s_N: Floats = np.full(devices, nan)
        self._row_bytes_down, self._row_bytes_up, self._header_bytes = row_bytes_down, row_bytes_up, header_bytes
        self._header_rows = header_bytes / row_bytes_down, header_bytes / row_bytes_up
        self._memory_rounds = float(memory_rounds)
        # Q: compute, down, up. A link's coefficients are of a block, 0 and of the bytes of a row, to be near 1 in size.
        self._coef_NQC = np.full((devices, 3, 3), nan)
        self._spread_NQCC = np.zeros((devices, 3, 3, 3))
        self._manner_NQM = np.zeros((devices, 3, 2))
        self._slowdown_N = np.ones(devices)  # by replies that never came
        self._row_bytes_2 = np.array([row_bytes_down, row_bytes_up], np.float64)

    def teach(self, device: int, lesson: Lesson, now_s: float) -> None:
        """Learn from one answered block, in time or late. Raises ValueError for what cannot be a measurement."""
        self._check(device, lesson.rows, lesson.experts, min(lesson.bytes_down, lesson.bytes_up))
        what_14, seconds_14 = np.array([lesson[:4]], np.int64), np.array([lesson[4:]], np.float64)
        self.teach_all(np.array([device]), what_14, seconds_14, NO_RATIO, np.array([now_s]))

    def teach_all(
        self,
        device_B: Ints,
        what_B4: Ints,
        seconds_B4: Floats,
        air_ratio_B2: Floats,
        now_s_B: Floats,
    ) -> Floats:
        """Learn from B answered blocks, in their order; returns what was expected of each before, predicted_s_B3.

        what: rows, experts touched, bytes down, bytes up; seconds: a `Lesson`'s. air_ratio: how many times the rate
        that it has at the even split of the band each way had. Where only the sum of both ways is known, or an error
        of the clocks leaves nothing for one of them, the sum is split as predicted: then the sum is measured and the
        directions are inferred. Raises ValueError for what cannot be a measurement.
        """
        predicted_s_B3 = np.empty((len(device_B), 3))
        taught = teach_all(
            self._coef_NQC, self._spread_NQCC, self._manner_NQM, self._slowdown_N, self.lessons_N, self.taught_at_s_N,
            device_B, what_B4, seconds_B4, air_ratio_B2, now_s_B, self._row_bytes_2, self._memory_rounds,
            predicted_s_B3,
        )  # fmt: skip
        if taught < len(device_B):
            what, seconds = what_B4[taught].tolist(), seconds_B4[taught].tolist()
            raise ValueError(f"device {device_B[taught]}: {Lesson(*what, *seconds)} is no measurement")
        return predicted_s_B3

    def teach_at_least(
        self,
        device: int,
        rows: int,
        experts: int,
        seconds: float,
        now_s: float,
        air_ratio: Sequence[float] = (1.0, 1.0),
    ) -> None:
        """A reply that never came: the block cost at least `seconds`, the deadline. Raises ValueError as `teach`.

        What is predicted is raised to that by one factor, which the next reply lowers to what it says itself; the fit
        does not change, since nobody knows what was slow. A device never measured is assumed to cost `seconds`, a
        third of it in each part, until its first reply. air_ratio: as in `teach_all`.
        """
        self._check(device, rows, experts, 1)
        if not 0 < seconds < LONGEST_S:
            raise ValueError(f"device {device}: a deadline of {seconds} s is no measurement")
        even_bytes = self._block_bytes(rows)
        bytes_down, bytes_up = (max(1, round(size / ratio)) for size, ratio in zip(even_bytes, air_ratio, strict=True))
        if np.isnan(self._coef_NQC[device, 0, 0]):
            third_s = seconds / 3
            self.teach(device, Lesson(rows, experts, bytes_down, bytes_up, third_s, third_s, third_s), now_s)
            self.lessons_N[device] = 0  # the first reply starts anew
        predicted_s = self.predict(device, rows, experts, bytes_down, bytes_up).total_s
        self._slowdown_N[device] *= max(seconds / predicted_s, 1.0)
        self.taught_at_s_N[device] = now_s

    def forget(self, device: int) -> None:
        """The device is back as another process: what was learnt is now a prior that lessons change more easily."""
        self._check(device, 1, 1, 1)
        self._spread_NQCC[device] *= DOUBT_OF_RETURNED
        self._manner_NQM[device, :, NOISE], self._manner_NQM[device, :, HELD] = START_NOISE, 0.0
        self._slowdown_N[device] = 1.0

    def predict(self, device: int, rows: int, experts: int, bytes_down: int, bytes_up: int) -> Prediction:
        """Seconds that a block of `rows` rows for `experts` experts will take on its ways and on the device."""
        self._check(device, rows, experts, min(bytes_down, bytes_up))
        (base_s, expert_s, row_s), (down_s, _, down_row_s), (up_s, _, up_row_s) = self._coef_NQC[device].tolist()
        slowdown = float(self._slowdown_N[device])
        return Prediction(
            slowdown * (base_s + expert_s * experts + row_s * rows),
            slowdown * (down_s + down_row_s * (bytes_down / self._row_bytes_down)),
            slowdown * (up_s + up_row_s * (bytes_up / self._row_bytes_up)),
        )

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State:  # noqa: ARG002
        """What a policy may know, as values of its own: later lessons do not change it.

        token_s_N is a block of one row for one expert (Eq. 6, measured). `phase` changes nothing: prefill and decode
        differ in rows and experts, which the fit knows.
        """
        cost_s_4N = np.empty((4, len(self._slowdown_N)))
        token_costs(self._coef_NQC, self._slowdown_N, *self._header_rows, cost_s_4N)
        token_s_N, base_s_N, expert_s_N, row_s_N = cost_s_4N
        return State(token_s_N, available_N.copy(), self.ages(now_s), base_s_N, expert_s_N, row_s_N)

    def air_row_s_WN(self) -> FloatArray:
        """Predicted seconds of one row on the air at the even split of the band; W: down, up. NaN if unknown."""
        row_s_WN: FloatArray = self._slowdown_N * self._coef_NQC[:, 1:, 2].T
        return row_s_WN

    def ages(self, now_s: float) -> FloatArray:
        """Seconds since each device last taught anything, N; NaN for one that never did."""
        return now_s - self.taught_at_s_N

    def _block_bytes(self, rows: int) -> tuple[int, int]:
        return rows * self._row_bytes_down + self._header_bytes, rows * self._row_bytes_up + self._header_bytes

    def _check(self, device: int, rows: int, experts: int, least_bytes: int) -> None:
        if not 0 <= device < len(self._slowdown_N):
            raise ValueError(f"no device {device} among {len(self._slowdown_N)}")
        if rows < 1 or experts < 1 or least_bytes < 1:
            raise ValueError(f"device {device}: a block has at least 1 row, 1 expert and 1 byte each way")
