from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.latency.known import KnownLatencies
from testbed.latency.model import ComputeModel, token_s
from testbed.policies.base import FloatArray, State

BITS_DOWN, BITS_UP = 8 * 4100.0, 8 * 2050.0
TIME_S = st.floats(1e-6, 10)
RATE = st.floats(1e3, 1e10)
PAPER = st.builds(ComputeModel, base_s=st.just(0.0), expert_s=st.just(0.0), row_s=TIME_S)
ROOFLINE = st.builds(ComputeModel, base_s=st.floats(0, 1), expert_s=TIME_S, row_s=TIME_S)


@dataclass(frozen=True)
class Told:
    """What the channel and the devices truly are."""

    down_N: FloatArray
    up_N: FloatArray
    delay_s: float
    compute_N: list[ComputeModel]
    factor_N: FloatArray

    def known(self, now_s: float = 0.0) -> KnownLatencies:
        known = KnownLatencies(len(self.compute_N), BITS_DOWN, BITS_UP)
        known.tell(self.down_N, self.up_N, self.delay_s, self.compute_N, self.factor_N, now_s)
        return known

    def compute_s_N(self, rows: int, experts: int) -> FloatArray:
        return np.array([model.seconds(rows, experts) for model in self.compute_N]) * self.factor_N

    def link_s_N(self, rows: int) -> FloatArray:
        return rows * (BITS_DOWN / self.down_N + BITS_UP / self.up_N) + 2 * self.delay_s


@st.composite
def truths(draw: st.DrawFn, models: st.SearchStrategy[ComputeModel]) -> Told:
    devices = draw(st.integers(1, 5))

    def each(values: st.SearchStrategy[float]) -> FloatArray:
        return np.array(draw(st.lists(values, min_size=devices, max_size=devices)))

    compute_N = draw(st.lists(models, min_size=devices, max_size=devices))
    return Told(each(RATE), each(RATE), draw(st.floats(0, 0.1)), compute_N, each(st.floats(1, 100)))


def state_of(known: KnownLatencies, devices: int, now_s: float = 0.0) -> State:
    return known.state(0, np.ones(devices, bool), now_s)


def costs(told: Told, rows: int, experts: int) -> FloatArray:
    devices = len(told.compute_N)
    return state_of(told.known(), devices).cost_s_N(np.full(devices, rows), np.full(devices, experts))


@given(truths(PAPER | ROOFLINE))
def test_the_time_of_one_token_is_eq_6_and_the_delay_of_both_ways(told: Told) -> None:
    eq_6 = token_s(BITS_DOWN, BITS_UP, told.down_N, told.up_N, told.compute_s_N(1, 1))
    state = state_of(told.known(), len(told.compute_N))
    np.testing.assert_allclose(state.token_s_N, eq_6 + 2 * told.delay_s, rtol=1e-12)


@given(truths(PAPER), st.integers(1, 500), st.integers(1, 8))
def test_a_rounds_cost_is_that_of_links_and_the_papers_compute(told: Told, rows: int, experts: int) -> None:
    true_s_N = told.link_s_N(rows) + told.compute_s_N(rows, experts)
    np.testing.assert_allclose(costs(told, rows, experts), true_s_N, rtol=1e-9)


@given(truths(ROOFLINE), st.integers(1, 8), st.integers(0, 500))
def test_under_the_roofline_a_rounds_cost_is_never_below_the_truth_nor_twice_above(
    told: Told, experts: int, more_rows: int
) -> None:
    rows = experts + more_rows
    compute_s_N, cost_s_N = told.compute_s_N(rows, experts), costs(told, rows, experts)
    assert (cost_s_N >= (told.link_s_N(rows) + compute_s_N) * (1 - 1e-9)).all()
    assert (cost_s_N <= (told.link_s_N(rows) + 2 * compute_s_N) * (1 + 1e-9)).all()


@given(truths(PAPER | ROOFLINE))
def test_who_is_sent_nothing_costs_nothing(told: Told) -> None:
    assert (costs(told, 0, 0) == 0).all()


def test_nothing_is_known_before_it_is_told() -> None:
    state = state_of(KnownLatencies(2, BITS_DOWN, BITS_UP), 2)
    for field in (state.token_s_N, state.age_s_N, state.base_s_N, state.expert_s_N, state.row_s_N):
        assert np.isnan(field).all()
        assert field.shape == (2,)


def two_devices(factor: float = 1.0) -> Told:
    models = [ComputeModel.paper(1e6, 1e9), ComputeModel.roofline(1e6, 1e9, 1e7, 1e9, 0.001)]
    return Told(np.array([1e6, 2e6]), np.array([1e5, 1e5]), 0.002, models, np.full(2, factor))


def test_a_throttled_device_is_slower_by_its_factor_and_its_link_is_not() -> None:
    link_s_N = two_devices().link_s_N(1)
    usual, throttled = (state_of(two_devices(factor).known(), 2).token_s_N - link_s_N for factor in (1, 10))
    assert throttled == pytest.approx(10 * usual)


@given(truths(PAPER | ROOFLINE))
def test_a_row_on_the_air_takes_its_bits_at_the_rates_that_were_told(told: Told) -> None:
    down_s_N, up_s_N = told.known().air_row_s_WN()
    np.testing.assert_allclose(down_s_N, BITS_DOWN / told.down_N)
    np.testing.assert_allclose(up_s_N, BITS_UP / told.up_N)


@given(truths(PAPER | ROOFLINE), st.integers(1, 500), st.integers(1, 8), st.floats(0.01, 8), st.floats(0.01, 8))
def test_what_is_expected_of_a_block_is_what_it_takes_in_its_share_of_the_band(
    told: Told, rows: int, experts: int, down_ratio: float, up_ratio: float
) -> None:
    devices = len(told.compute_N)
    bytes_down, bytes_up = 5 * rows, 7 * rows
    what_B4 = np.tile([rows, experts, bytes_down, bytes_up], (devices, 1))
    ratio_B2 = np.tile([down_ratio, up_ratio], (devices, 1))
    now_s_B = np.zeros(devices)
    predicted_s_B3 = told.known().teach_all(np.arange(devices), what_B4, np.ones((devices, 4)), ratio_B2, now_s_B)
    expected_s_3B = (
        told.compute_s_N(rows, experts),
        8 * bytes_down / (told.down_N * down_ratio) + told.delay_s,  # a delay is none of the band's
        8 * bytes_up / (told.up_N * up_ratio) + told.delay_s,
    )
    np.testing.assert_allclose(predicted_s_B3, np.transpose(expected_s_3B), rtol=1e-9)


def test_nothing_is_expected_before_it_is_told_nor_of_no_block() -> None:
    known = KnownLatencies(2, BITS_DOWN, BITS_UP)
    assert np.isnan(known.air_row_s_WN()).all()
    one = np.array([0]), np.array([[1, 1, 100, 100]]), np.ones((1, 4)), np.ones((1, 2)), np.ones(1)
    assert np.isnan(known.teach_all(*one)).all()
    assert two_devices().known().teach_all(*(values[:0] for values in one)).shape == (0, 3)


def test_measurements_change_nothing() -> None:
    told = two_devices()
    known = told.known()
    before = state_of(known, 2)
    known.teach_all(np.array([0]), np.array([[1, 1, 100, 100]]), np.full((1, 4), 9.0), np.ones((1, 2)), np.ones(1))
    known.teach_at_least(1, 1, 1, 100.0, 1.0)
    after = state_of(known, 2)
    np.testing.assert_array_equal(before.token_s_N, after.token_s_N)
    np.testing.assert_array_equal(before.row_s_N, after.row_s_N)


def test_what_a_policy_saw_does_not_change_when_more_is_told() -> None:
    known = two_devices().known()
    before = state_of(known, 2)
    seen = before.token_s_N.copy()
    slower = two_devices(10)
    known.tell(slower.down_N, slower.up_N, slower.delay_s, slower.compute_N, slower.factor_N, 1.0)
    np.testing.assert_array_equal(before.token_s_N, seen)
    assert (state_of(known, 2).token_s_N > seen).all()


def test_an_estimate_is_as_old_as_the_last_telling_and_availability_passes_through() -> None:
    state = two_devices().known(now_s=5.0).state(1, np.array([True, False]), 7.5)
    assert state.age_s_N.tolist() == [2.5, 2.5]
    assert state.available_N.tolist() == [True, False]
    assert not math.isnan(state.token_s_N[1])  # away, and still known
