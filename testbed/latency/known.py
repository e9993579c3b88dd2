"""What a policy would know if it were told the rates: Eq. 6, at the start of a run or at every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testbed.latency.estimator import Prediction
from testbed.latency.lessons import Floats, Ints
from testbed.latency.model import ComputeModel
from testbed.policies.base import BoolArray, FloatArray, State


class KnownLatencies:
    """Answers as an estimator does, from figures that it is told (`tell`) instead of measurements, which it ignores."""

    def __init__(self, devices: int, row_bits_down: float, row_bits_up: float) -> None:
        self._row_bits_down, self._row_bits_up = row_bits_down, row_bits_up
        self._unknown_N = np.full(devices, np.nan)
        self.token_s_N = self._base_s_N = self._expert_s_N = self._row_s_N = self._unknown_N
        self._told_at_s = np.nan
        self._rates_WN: FloatArray | None = None  # W: down, up

    def tell(
        self,
        down_bits_per_s_N: FloatArray,
        up_bits_per_s_N: FloatArray,
        delay_s: float,
        compute_N: Sequence[ComputeModel],
        factor_N: FloatArray,
        now_s: float,
    ) -> None:
        """The channel's rates, its one-way delay, and each device's compute model times a factor."""
        link_row_s_N = self._row_bits_down / down_bits_per_s_N + self._row_bits_up / up_bits_per_s_N
        one_row_s_N = np.array([float(model.seconds(1, 1)) for model in compute_N]) * factor_N
        self.token_s_N = link_row_s_N + one_row_s_N + 2 * delay_s
        self._base_s_N = np.array([model.base_s for model in compute_N]) * factor_N + 2 * delay_s
        self._expert_s_N = np.array([model.expert_s for model in compute_N]) * factor_N
        self._row_s_N = link_row_s_N + np.array([model.row_s for model in compute_N]) * factor_N
        self._told_at_s = now_s
        self._rates_WN, self._delay_s = np.stack([down_bits_per_s_N, up_bits_per_s_N]), delay_s
        self._compute_N, self._factor_N = compute_N, factor_N

    def teach_all(
        self,
        device_B: Ints,
        what_B4: Ints,
        seconds_B4: Floats,  # noqa: ARG002 - nothing is learnt from a measurement
        air_ratio_B2: Floats,
        now_s_B: Floats,  # noqa: ARG002
    ) -> Floats:
        """Nothing is learnt from measurements; what was expected of each block is told, as an estimator does."""
        at_even_B4 = np.hstack([what_B4[:, :2], what_B4[:, 2:] / air_ratio_B2])  # as many bytes then take as long
        predicted_s_B3 = [self.predict(*one) for one in zip(device_B.tolist(), *at_even_B4.T.tolist(), strict=True)]
        return np.array(predicted_s_B3).reshape(-1, 3)

    def teach_at_least(
        self,
        device: int,
        rows: int,
        experts: int,
        seconds: float,
        now_s: float,
        air_ratio: Sequence[float] = (1.0, 1.0),
    ) -> None:
        """Nothing is learnt from a loss."""

    def predict(self, device: int, rows: int, experts: int, bytes_down: float, bytes_up: float) -> Prediction:
        """Seconds of one block at the rates told; NaN before."""
        if self._rates_WN is None:
            return Prediction(np.nan, np.nan, np.nan)
        down_s, up_s = 8 * np.array([bytes_down, bytes_up]) / self._rates_WN[:, device] + self._delay_s
        compute_s = float(self._compute_N[device].seconds(rows, experts)) * self._factor_N[device]
        return Prediction(float(compute_s), float(down_s), float(up_s))

    def air_row_s_WN(self) -> FloatArray:
        """Seconds of one row on the air, down and up; NaN before it is told."""
        if self._rates_WN is None:
            return np.full((2, len(self._unknown_N)), np.nan)
        row_s_WN: FloatArray = np.array([[self._row_bits_down], [self._row_bits_up]]) / self._rates_WN
        return row_s_WN

    def forget(self, device: int) -> None:
        """What is told stays true."""

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State:  # noqa: ARG002 - as all estimates
        age_s_N = np.full(len(available_N), now_s - self._told_at_s)
        return State(self.token_s_N, available_N, age_s_N, self._base_s_N, self._expert_s_N, self._row_s_N)
