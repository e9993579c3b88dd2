from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.latency import DECODE, PREFILL, RunningMean

ALL_3 = np.ones(3, bool)


def test_a_device_never_measured_is_unknown_and_not_0() -> None:
    state = RunningMean(3).state(DECODE, ALL_3, now_s=5.0)
    assert np.isnan(state.token_s_N).all()
    assert np.isnan(state.age_s_N).all()


def test_the_first_lessons_make_a_plain_mean_of_seconds_per_token() -> None:
    latency = RunningMean(3)
    latency.teach(1, PREFILL, rows=10, seconds=0.1, now_s=1.0)
    latency.teach(1, PREFILL, rows=1, seconds=0.03, now_s=2.0)
    state = latency.state(PREFILL, ALL_3, now_s=5.0)
    np.testing.assert_allclose(state.token_s_N, [np.nan, 0.02, np.nan])
    np.testing.assert_allclose(state.age_s_N, [np.nan, 3.0, np.nan])
    assert latency.lessons_PN[PREFILL].tolist() == [0, 2, 0]


def test_phases_are_kept_apart_and_stand_in_for_each_other() -> None:
    latency = RunningMean(3)
    latency.teach(0, PREFILL, rows=100, seconds=0.1, now_s=1.0)
    latency.teach(0, DECODE, rows=1, seconds=0.008, now_s=2.0)
    latency.teach(1, PREFILL, rows=100, seconds=0.2, now_s=3.0)
    decode = latency.state(DECODE, ALL_3, now_s=4.0)
    np.testing.assert_allclose(decode.token_s_N, [0.008, 0.002, np.nan])
    np.testing.assert_allclose(decode.age_s_N, [2.0, 1.0, np.nan])
    np.testing.assert_allclose(latency.state(PREFILL, ALL_3, 4.0).token_s_N, [0.001, 0.002, np.nan])


def test_older_lessons_fade() -> None:
    latency = RunningMean(1, memory=4)
    for _ in range(1000):
        latency.teach(0, DECODE, 1, 1.0, 0.0)
    for _ in range(4):
        latency.teach(0, DECODE, 1, 2.0, 0.0)
    expected_s = 2 - 0.75**4
    np.testing.assert_allclose(latency.mean_s_PN[DECODE], [expected_s])


@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=60), st.integers(1, 40))
def test_the_mean_stays_between_the_lessons(lessons_s: list[float], memory: int) -> None:
    latency = RunningMean(1, memory)
    for seconds in lessons_s:
        latency.teach(0, DECODE, 1, seconds, 0.0)
    mean_s = latency.mean_s_PN[DECODE, 0]
    assert min(lessons_s) * (1 - 1e-9) <= mean_s <= max(lessons_s) * (1 + 1e-9)


def test_a_state_stays_as_it_was_when_lessons_go_on() -> None:
    latency, available_N = RunningMean(3), np.array([True, False, True])
    latency.teach(0, DECODE, 1, 0.01, 0.0)
    state = latency.state(DECODE, available_N, 1.0)
    latency.teach(0, DECODE, 1, 0.03, 2.0)
    available_N[:] = False
    assert state.token_s_N[0] == 0.01
    assert state.age_s_N[0] == 1.0
    assert state.available_N.tolist() == [True, False, True]


def test_the_cost_of_a_round_is_its_rows_times_the_mean() -> None:
    latency = RunningMean(3)
    latency.teach(0, DECODE, 1, 0.01, 0.0)
    cost_s_N = latency.state(DECODE, ALL_3, 1.0).cost_s_N(np.array([5, 0, 1]), np.array([2, 0, 1]))
    np.testing.assert_allclose(cost_s_N, [0.05, 0.0, np.nan])


@pytest.mark.parametrize(
    ("device", "phase", "rows", "seconds"),
    [(3, 0, 1, 0.1), (-1, 0, 1, 0.1), (0, 2, 1, 0.1), (0, 0, 0, 0.1)]
    + [(0, 0, 1, seconds) for seconds in (0.0, -0.1, math.nan, math.inf)],
)
def test_what_cannot_be_a_measurement_teaches_nothing(device: int, phase: int, rows: int, seconds: float) -> None:
    latency = RunningMean(3)
    with pytest.raises(ValueError, match=str(device)):
        latency.teach(device, phase, rows, seconds, now_s=0.0)
    assert latency.lessons_PN.sum() == 0


def test_a_mean_of_no_devices_or_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RunningMean(0)
    with pytest.raises(ValueError, match="at least 1"):
        RunningMean(2, memory=0)
