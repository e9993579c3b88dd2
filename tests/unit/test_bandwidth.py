"""The split of the band against plain bisection, a general solver and what must hold of every split."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from testbed.errors import ConfigError
from testbed.policies.allocation_kernels import allocate_block, least_max_shares
from testbed.policies.bandwidth import (
    FLOOR_OF_EVEN,
    block_shares,
    block_time_s,
    device_times_s,
    period_shares,
    proportional_shares,
    rate_ratio,
    spectral_snr_hz,
)
from testbed.policies.base import Air, FloatArray, IntArray, State

Block = tuple[IntArray, IntArray, State]
ROW_BITS = 8 * 4096


def power_of_ten(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda exponent: 10.0**exponent)


SNR_HZ = power_of_ten(2, 14) | st.just(math.inf)


def rate(band_hz: float, snr_hz: float) -> float:
    return band_hz if math.isinf(snr_hz) else band_hz * math.log1p(snr_hz / band_hz) / math.log(2)


@st.composite
def states(draw: st.DrawFn, devices: int) -> State:
    """Rates at the even split from 1 kbit/s to 1 Gbit/s: of a radio, or shaped."""
    bandwidth_hz = draw(power_of_ten(5, 9))

    def each(values: st.SearchStrategy[float]) -> FloatArray:
        return np.array(draw(st.lists(values, min_size=devices, max_size=devices)))

    snr_hz_WN = np.stack([each(SNR_HZ), each(SNR_HZ)])
    air_row_s_WN = np.stack([each(power_of_ten(3, 9)), each(power_of_ten(3, 9))]) ** -1 * ROW_BITS
    compute_row_s_N = each(st.just(0.0) | power_of_ten(-6, -1))
    row_s_N = compute_row_s_N + air_row_s_WN.sum(axis=0)
    base_s_N, expert_s_N = each(power_of_ten(-5, -1)), each(st.just(0.0) | power_of_ten(-4, -1))
    return state_of(base_s_N, expert_s_N, row_s_N, Air(bandwidth_hz, snr_hz_WN, air_row_s_WN))


def state_of(base_s_N: FloatArray, expert_s_N: FloatArray, row_s_N: FloatArray, air: Air | None) -> State:
    devices = len(row_s_N)
    return State(
        row_s_N + base_s_N + expert_s_N, np.ones(devices, bool), np.zeros(devices), base_s_N, expert_s_N, row_s_N, air
    )


SCIPY_ROUNDS = pytest.mark.filterwarnings("ignore:Values in x were outside bounds:RuntimeWarning")  # and clips them
ROWS = st.just(0) | st.integers(1, 512)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    devices = draw(st.integers(1, 9))
    rows_N = np.array(draw(st.lists(ROWS, min_size=devices, max_size=devices)))
    if not rows_N.any():
        rows_N[draw(st.integers(0, devices - 1))] = 1
    experts_N = np.minimum(rows_N, draw(st.integers(1, 4)))
    return rows_N, experts_N, draw(states(devices))


def seeded_blocks(seed: int, blocks: int, devices: int) -> Block:
    """Uneven loads, fading links of 50 to 500 m, slow and fast devices."""
    rng = np.random.default_rng(seed)
    rows_BN = np.array([rng.multinomial(8 * devices, rng.dirichlet(np.full(devices, 1.0))) for _ in range(blocks)])
    gain_N = 10 ** (-43.3 / 20) / rng.uniform(50, 500, devices) * rng.rayleigh(0.8, devices)
    snr_hz_WN = np.array([[10.0], [0.2]]) * gain_N**2 / 2e-20
    even_hz = 100e6 / 8
    air_row_s_WN = ROW_BITS / (even_hz * np.log2(1 + snr_hz_WN / even_hz))
    row_s_N = air_row_s_WN.sum(axis=0) + rng.choice([2e-5, 1e-4, 7e-4], devices)
    nothing_N = np.zeros(devices)
    air = Air(even_hz * devices, snr_hz_WN, air_row_s_WN)
    return rows_BN, np.minimum(rows_BN, 1), state_of(nothing_N + 1e-3, nothing_N + 1e-4, row_s_N, air)


def shape_rates(state: State) -> State:
    assert state.air is not None
    snr_hz_WN = np.full_like(state.air.snr_hz_WN, np.inf)
    return dataclasses.replace(state, air=dataclasses.replace(state.air, snr_hz_WN=snr_hz_WN))


def forget(state: State, device: int) -> State:
    """Nothing is known of the device."""
    assert state.air is not None

    def without(values: FloatArray) -> FloatArray:
        return np.where(np.arange(values.shape[-1]) == device, np.nan, values)

    air = dataclasses.replace(state.air, snr_hz_WN=without(state.air.snr_hz_WN), row_s_WN=without(state.air.row_s_WN))
    return state_of(without(state.base_s_N), without(state.expert_s_N), without(state.row_s_N), air)


def reorder(block: Block, order_N: IntArray) -> Block:
    rows_N, experts_N, state = block
    assert state.air is not None
    air = dataclasses.replace(
        state.air, snr_hz_WN=state.air.snr_hz_WN[:, order_N], row_s_WN=state.air.row_s_WN[:, order_N]
    )
    costs = (state.base_s_N[order_N], state.expert_s_N[order_N], state.row_s_N[order_N])
    return rows_N[order_N], experts_N[order_N], state_of(*costs, air)


# --- the slow, obvious reference ---


def plain_time_s(block: Block, device: int, band_hz: float) -> float:
    rows_N, experts_N, state = block
    assert state.air is not None
    rows, even_hz = float(rows_N[device]), state.air.bandwidth_hz / len(rows_N)
    seconds = float(state.base_s_N[device] + experts_N[device] * state.expert_s_N[device])
    seconds += rows * float(state.row_s_N[device] - state.air.row_s_WN[:, device].sum())
    for row_s, snr_hz in zip(state.air.row_s_WN[:, device], state.air.snr_hz_WN[:, device], strict=True):
        seconds += rows * float(row_s) * rate(even_hz, float(snr_hz)) / rate(band_hz, float(snr_hz))
    return seconds


def least_band_hz(block: Block, device: int, within_s: float, most_hz: float) -> float:
    """By halving the range of its logarithm."""
    low, high = math.log(most_hz) - 60, math.log(most_hz)
    if plain_time_s(block, device, most_hz) > within_s:
        return math.inf
    while high - low > 1e-9:
        middle = (low + high) / 2
        if plain_time_s(block, device, math.exp(middle)) > within_s:
            low = middle
        else:
            high = middle
    return math.exp(high)


def bisected_s(block: Block) -> float:
    """The least time within which the least bands of all devices fit into the band."""
    rows_N, _, state = block
    assert state.air is not None
    band_hz, busy = state.air.bandwidth_hz, [int(n) for n in np.flatnonzero(rows_N)]
    low = max(plain_time_s(block, n, band_hz) for n in busy)
    high = max(plain_time_s(block, n, band_hz / len(busy)) for n in busy)
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        if sum(least_band_hz(block, n, middle, band_hz) for n in busy) > band_hz:
            low = middle
        else:
            high = middle
    return high


def reference_times_s(block: Block, share_N: FloatArray) -> FloatArray:
    rows_N, experts_N, state = block
    assert state.air is not None
    bandwidth_hz, snr_hz_WN = state.air.bandwidth_hz, state.air.snr_hz_WN

    def rate_WN(band_hz: FloatArray) -> FloatArray:
        ratio_WN = np.where(np.isinf(snr_hz_WN), 0, snr_hz_WN / band_hz)
        return np.where(np.isinf(snr_hz_WN), band_hz, band_hz * np.log1p(ratio_WN) / np.log(2))

    even_N = np.full(len(rows_N), bandwidth_hz / len(rows_N))
    slower_WN = rate_WN(even_N) / rate_WN(share_N * bandwidth_hz) - 1
    row_s_N = state.row_s_N + (state.air.row_s_WN * slower_WN).sum(axis=0)
    return state.base_s_N + experts_N * state.expert_s_N + rows_N * row_s_N


def solved_by_scipy_s(block: Block) -> float:
    """Least t with time_n(exp(v_n)) <= t and sum exp(v) <= 1: v are the logarithms of the shares, times are too."""
    busy_N = block[0] > 0
    busy = np.count_nonzero(busy_N)

    def log_times(v: FloatArray) -> FloatArray:
        share_N = np.ones(len(busy_N))
        share_N[busy_N] = np.exp(v)
        return np.log(reference_times_s(block, share_N)[busy_N])

    start_v = np.full(busy, -math.log(busy))
    result = optimize.minimize(
        lambda x: x[-1],
        np.append(start_v, log_times(start_v).max()),
        jac="3-point",
        method="SLSQP",
        bounds=[(-40, 0)] * busy + [(None, None)],
        constraints=[
            {"type": "ineq", "fun": lambda x: x[-1] - log_times(x[:-1])},
            {"type": "ineq", "fun": lambda x: 1 - np.exp(x[:-1]).sum()},
        ],
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return math.exp(result.x[-1])


# --- one block ---


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_the_best_split_takes_as_long_as_plain_bisection_finds(block: Block) -> None:
    assert block_shares(*block)[1] == pytest.approx(bisected_s(block), rel=1e-6)


@SCIPY_ROUNDS
@settings(max_examples=100, deadline=None)
@given(blocks())
def test_the_best_split_takes_as_long_as_a_general_solver_finds(block: Block) -> None:
    assert block_shares(*block)[1] == pytest.approx(solved_by_scipy_s(block), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(blocks())
def test_the_best_split_uses_the_whole_band_and_leaves_nothing_to_idle_devices(block: Block) -> None:
    rows_N = block[0]
    share_N, _ = block_shares(*block)
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert np.array_equal(share_N > 0, rows_N > 0)


@settings(max_examples=50, deadline=None)
@given(blocks())
def test_the_best_split_is_never_slower_than_the_even_or_the_proportional_one(block: Block) -> None:
    _, predicted_s = block_shares(*block)
    assert predicted_s <= block_time_s(*block) * (1 + 1e-10)
    assert predicted_s <= block_time_s(*block, proportional_shares(block[0])) * (1 + 1e-10)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.data())
def test_the_order_of_devices_does_not_matter(block: Block, data: st.DataObject) -> None:
    order_N = np.array(data.draw(st.permutations(range(len(block[0])))))
    share_N, predicted_s = block_shares(*block)
    permuted_N, permuted_s = block_shares(*reorder(block, order_N))
    assert permuted_s == pytest.approx(predicted_s, rel=1e-9)
    assert permuted_N == pytest.approx(share_N[order_N], rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.data())
def test_where_the_search_starts_does_not_matter(block: Block, data: st.DataObject) -> None:
    start = st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0, 7.0])
    start_N = np.array(data.draw(st.lists(start, min_size=len(block[0]), max_size=len(block[0]))))
    kept_N = start_N.copy()
    assert block_shares(*block, start_N)[1] == pytest.approx(block_shares(*block)[1], rel=1e-9)
    assert np.array_equal(start_N, kept_N)


@settings(max_examples=40, deadline=None)
@given(blocks())
def test_all_devices_with_rows_end_at_the_same_time(block: Block) -> None:
    share_N, predicted_s = block_shares(*block)
    assert device_times_s(*block, share_N)[block[0] > 0] == pytest.approx(predicted_s, rel=1e-9)


def test_256_devices_are_split_exactly_as_well() -> None:
    rows_BN, experts_BN, state = seeded_blocks(1, 1, 256)
    block = rows_BN[0], experts_BN[0], state
    share_N, predicted_s = block_shares(*block)
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert device_times_s(*block, share_N)[rows_BN[0] > 0] == pytest.approx(predicted_s, rel=1e-9)


def test_compiled_the_core_does_what_it_does_in_python() -> None:
    rows_BN, _, state = seeded_blocks(2, 1, 8)
    assert state.air is not None
    bits_WN = rows_BN * np.full((2, 8), ROW_BITS, float)
    bits_WN[:, 0] = 0
    fixed_s_N = np.where(bits_WN[0] > 0, rows_BN[0] * 1e-4, 0)
    in_python_N, compiled_N = np.zeros(8), np.zeros(8)
    seconds = least_max_shares(fixed_s_N, bits_WN, state.air.snr_hz_WN, 1e8, in_python_N)
    allocate_block(fixed_s_N, bits_WN, state.air.snr_hz_WN, 1e8, compiled_N)
    assert compiled_N == pytest.approx(in_python_N, rel=1e-9)
    assert compiled_N[0] == 0
    assert seconds >= fixed_s_N.max()


def test_a_device_that_sends_nothing_over_the_air_may_be_the_slowest() -> None:
    share_N = np.zeros(2)
    bits_WN = np.array([[0.0, 1e6], [0.0, 1e6]])
    seconds = least_max_shares(np.array([5.0, 0.0]), bits_WN, np.full((2, 2), np.inf), 1e7, share_N)
    assert (seconds, share_N.tolist()) == (5.0, [0.0, 1.0])


def test_where_nothing_goes_over_the_air_the_core_splits_evenly() -> None:
    share_N = np.array([0.9, 0.1])
    assert least_max_shares(np.array([3.0, 1.0]), np.zeros((2, 2)), np.ones((2, 2)), 1e7, share_N) == 3.0
    assert share_N.tolist() == [0.5, 0.5]


def test_shaped_links_of_equal_devices_share_the_rate_as_their_rows_are() -> None:
    rows_N = np.array([1, 0, 3])
    air = Air(30e6, np.full((2, 3), np.inf), np.full((2, 3), ROW_BITS / 10e6))
    state = state_of(np.zeros(3), np.zeros(3), air.row_s_WN.sum(axis=0), air)
    share_N, predicted_s = block_shares(rows_N, rows_N, state)
    assert share_N == pytest.approx([0.25, 0, 0.75])
    assert predicted_s == pytest.approx(4 * 2 * ROW_BITS / 30e6)


# --- what is not known ---


@settings(max_examples=40, deadline=None)
@given(blocks(), st.data())
def test_an_unknown_device_with_rows_keeps_its_even_part_and_the_rest_is_split_as_well_as_can_be(
    block: Block, data: st.DataObject
) -> None:
    rows_N, experts_N, state = block
    busy = [int(n) for n in np.flatnonzero(rows_N)]
    unknown = data.draw(st.sampled_from(busy))
    share_N, predicted_s = block_shares(rows_N, experts_N, forget(state, unknown))
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert math.isnan(predicted_s)
    if len(busy) == 1:
        assert share_N[unknown] == 1
        return
    assert share_N[unknown] == 1 / len(rows_N)
    others_s_N = device_times_s(rows_N, experts_N, state, share_N)[np.setdiff1d(busy, unknown)]
    assert others_s_N == pytest.approx(others_s_N.max(), rel=1e-9)


def test_an_idle_device_may_be_unknown() -> None:
    rows_BN, experts_BN, state = seeded_blocks(3, 1, 4)
    rows_N = rows_BN[0] + 1
    rows_N[2] = 0
    share_N, predicted_s = block_shares(rows_N, experts_BN[0], forget(state, 2))
    expected_N, expected_s = block_shares(rows_N, experts_BN[0], state)
    assert (share_N.tolist(), predicted_s) == (expected_N.tolist(), expected_s)


def test_devices_of_which_none_is_known_share_evenly_if_they_have_rows() -> None:
    _, _, state = seeded_blocks(4, 1, 3)
    for device in range(3):
        state = forget(state, device)
    share_N, predicted_s = block_shares(np.array([5, 0, 1]), np.array([1, 0, 1]), state)
    assert share_N.tolist() == [0.5, 0, 0.5]
    assert math.isnan(predicted_s)


def test_without_rows_the_split_is_even_and_takes_no_time() -> None:
    _, _, state = seeded_blocks(5, 1, 4)
    share_N, predicted_s = block_shares(np.zeros(4, int), np.zeros(4, int), state)
    assert (share_N.tolist(), predicted_s) == ([0.25] * 4, 0.0)


def test_without_a_band_there_is_nothing_to_split() -> None:
    rows_BN, experts_BN, state = seeded_blocks(6, 2, 4)
    state = dataclasses.replace(state, air=None)
    assert block_time_s(rows_BN[0], experts_BN[0], state) > 0
    with pytest.raises(ConfigError, match="no band to split"):
        block_shares(rows_BN[0], experts_BN[0], state)
    with pytest.raises(ConfigError, match="no band to split"):
        period_shares(rows_BN, experts_BN, state)


# --- what a block is predicted to take ---


@settings(max_examples=40, deadline=None)
@given(blocks())
def test_at_the_even_split_a_block_takes_what_the_state_says(block: Block) -> None:
    rows_N, experts_N, state = block
    longest_s = state.cost_s_N(rows_N, experts_N).max()
    assert block_time_s(*block) == longest_s
    assert block_time_s(*block, np.full(len(rows_N), 1 / len(rows_N))) == longest_s


@settings(max_examples=40, deadline=None)
@given(blocks(), st.data())
def test_under_any_shares_a_device_takes_what_the_formula_says(block: Block, data: st.DataObject) -> None:
    weight = st.floats(1e-6, 1)
    weight_N = np.array(data.draw(st.lists(weight, min_size=len(block[0]), max_size=len(block[0]))))
    share_N = weight_N / weight_N.sum()
    expected_s_N = np.where(block[0] > 0, reference_times_s(block, share_N), 0)
    assert device_times_s(*block, share_N) == pytest.approx(expected_s_N, rel=1e-9)


def test_a_device_with_rows_and_no_band_never_ends() -> None:
    rows_BN, experts_BN, state = seeded_blocks(7, 1, 2)
    rows_N = rows_BN[0] + 1
    assert device_times_s(rows_N, experts_BN[0], state, np.array([1.0, 0.0]))[1] == math.inf
    assert block_time_s(rows_N, experts_BN[0], state, np.array([1.0, 0.0])) == math.inf


def test_an_unknown_snr_makes_unknown_what_is_not_at_the_even_split() -> None:
    rows_N, share_N = np.array([1, 1, 1]), np.array([1 / 3, 0.5, 1 / 6])
    _, _, state = seeded_blocks(8, 1, 3)
    assert state.air is not None
    air = dataclasses.replace(state.air, snr_hz_WN=np.full((2, 3), np.nan))
    times_s_N = device_times_s(rows_N, rows_N, dataclasses.replace(state, air=air), share_N)
    assert np.isnan(times_s_N).tolist() == [False, True, True]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_proportional_shares_are_proportional_and_sum_to_one(rows: list[int]) -> None:
    share_N = proportional_shares(np.array(rows))
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert share_N == pytest.approx(np.array(rows) / sum(rows) if any(rows) else np.full(len(rows), 1 / len(rows)))


# --- one split for several blocks ---


def scipy_period_s(rows_BN: IntArray, experts_BN: IntArray, state: State) -> float:
    """Least sum of t_B with time_BN(share) <= t_B, in units of the even split's mean block."""
    blocks, devices = rows_BN.shape
    busy_BN = rows_BN > 0

    def times_s_BN(share_N: FloatArray) -> FloatArray:
        return np.stack([reference_times_s((rows_BN[b], experts_BN[b], state), share_N) for b in range(blocks)])

    even_N = np.full(devices, 1 / devices)
    start_B = np.where(busy_BN, times_s_BN(even_N), 0).max(axis=1)
    unit_s = start_B.mean()
    result = optimize.minimize(
        lambda x: x[devices:].sum(),
        np.append(even_N, start_B / unit_s),
        jac="3-point",
        method="SLSQP",
        bounds=[(FLOOR_OF_EVEN / devices, 1)] * devices + [(0, None)] * blocks,
        constraints=[
            {"type": "ineq", "fun": lambda x: (x[devices:, None] - times_s_BN(x[:devices]) / unit_s)[busy_BN]},
            {"type": "eq", "fun": lambda x: x[:devices].sum() - 1},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert result.success
    return float(result.fun * unit_s)


def total_s(rows_BN: IntArray, experts_BN: IntArray, state: State, share_N: FloatArray) -> float:
    return sum(
        block_time_s(rows_N, experts_N, state, share_N) for rows_N, experts_N in zip(rows_BN, experts_BN, strict=True)
    )


@SCIPY_ROUNDS
@pytest.mark.parametrize("seed", range(25))
def test_one_split_for_several_blocks_is_as_good_as_a_general_solver_finds(seed: int) -> None:
    recent = seeded_blocks(seed, blocks=1 + seed % 6, devices=2 + seed % 4)
    found_s = total_s(*recent, period_shares(*recent))
    assert found_s == pytest.approx(scipy_period_s(*recent), rel=1e-4)


@SCIPY_ROUNDS
def test_one_split_for_several_blocks_is_as_good_where_rates_are_shaped() -> None:
    rows_BN, experts_BN, state = seeded_blocks(11, blocks=5, devices=4)
    recent = rows_BN, experts_BN, shape_rates(state)
    assert total_s(*recent, period_shares(*recent)) == pytest.approx(scipy_period_s(*recent), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.data())
def test_one_split_for_several_blocks_is_never_worse_than_the_even_one(block: Block, data: st.DataObject) -> None:
    rows_N, _, state = block
    more = st.lists(st.lists(ROWS, min_size=len(rows_N), max_size=len(rows_N)), max_size=4)
    rows_BN = np.array([rows_N, *data.draw(more)])
    recent = rows_BN, np.minimum(rows_BN, 2), state
    share_N = period_shares(*recent)
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert (share_N * len(rows_N) >= FLOOR_OF_EVEN).all()
    assert total_s(*recent, share_N) <= total_s(*recent, np.full(len(rows_N), 1 / len(rows_N)))


def test_over_a_period_the_order_of_devices_and_of_blocks_does_not_matter() -> None:
    rows_BN, experts_BN, state = seeded_blocks(12, blocks=6, devices=5)
    order_N = np.array([3, 0, 4, 1, 2])
    _, _, reordered = reorder((rows_BN[0], experts_BN[0], state), order_N)
    share_N = period_shares(rows_BN[::-1, order_N], experts_BN[::-1, order_N], reordered)
    assert share_N == pytest.approx(period_shares(rows_BN, experts_BN, state)[order_N], rel=1e-4)


def test_for_one_block_with_rows_everywhere_both_ways_to_split_agree() -> None:
    rows_BN, experts_BN, state = seeded_blocks(13, blocks=1, devices=4)
    rows_BN = rows_BN % 3 + 8
    found_s = total_s(rows_BN, experts_BN, state, period_shares(rows_BN, experts_BN, state))
    assert found_s == pytest.approx(block_shares(rows_BN[0], experts_BN[0], state)[1], rel=1e-4)


def test_over_a_period_an_unknown_device_keeps_its_even_part() -> None:
    rows_BN, experts_BN, state = seeded_blocks(14, blocks=6, devices=4)
    share_N = period_shares(rows_BN, experts_BN, forget(state, 1))
    assert share_N[1] == 0.25
    assert share_N.sum() == pytest.approx(1, rel=1e-9)
    assert np.ptp(share_N) > 0.01


def test_a_period_of_which_nothing_is_known_is_split_evenly() -> None:
    rows_BN, experts_BN, state = seeded_blocks(15, blocks=3, devices=2)
    assert period_shares(np.zeros_like(rows_BN), experts_BN, state).tolist() == [0.5, 0.5]
    assert period_shares(rows_BN[:0], experts_BN[:0], state).tolist() == [0.5, 0.5]
    assert period_shares(rows_BN, experts_BN, forget(forget(state, 0), 1)).tolist() == [0.5, 0.5]


# --- channel state from what was measured ---


@settings(max_examples=40, deadline=None)
@given(power_of_ten(3, 8), power_of_ten(5, 8))
def test_the_snr_from_a_measured_rate_gives_that_rate(bits_per_s: float, even_hz: float) -> None:
    snr_hz = float(spectral_snr_hz(ROW_BITS, ROW_BITS / min(bits_per_s, 60 * even_hz), even_hz))
    assert rate(even_hz, snr_hz) == pytest.approx(min(bits_per_s, 60 * even_hz), rel=1e-9)


def test_a_rate_beyond_any_radio_gives_a_finite_snr_and_an_unknown_one_none() -> None:
    row_s = np.array([1e-300, np.nan, 0.0, -1.0, np.inf])
    snr_hz = spectral_snr_hz(ROW_BITS, row_s, 1e6)
    assert np.isfinite(snr_hz).tolist() == [True, False, False, False, False]
    assert snr_hz[0] == pytest.approx(1e6 * 2.0**64)


@settings(max_examples=40, deadline=None)
@given(blocks())
def test_the_ratio_of_a_device_that_has_the_even_share_is_1(block: Block) -> None:
    rows_N, _, state = block
    assert state.air is not None
    unknown = dataclasses.replace(state.air, snr_hz_WN=np.full((2, len(rows_N)), np.nan))
    for air in (state.air, unknown):
        assert (rate_ratio(air, np.full(len(rows_N), 1 / len(rows_N))) == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1), SNR_HZ)
def test_an_air_time_under_any_share_times_the_ratio_is_that_at_the_even_split(share: float, snr_hz: float) -> None:
    air = Air(2e7, np.full((2, 2), snr_hz), np.ones((2, 2)))
    ratio_WN = rate_ratio(air, np.array([share, 1 - share]))
    assert ratio_WN[:, 0] == pytest.approx(rate(share * 2e7, snr_hz) / rate(1e7, snr_hz), rel=1e-9)


def test_under_no_share_no_air_time_was_measured() -> None:
    air = Air(2e7, np.array([[1e9, 1e9], [np.inf, np.inf]]), np.ones((2, 2)))
    assert np.isnan(rate_ratio(air, np.array([0.0, 1.0]))).tolist() == [[True, False], [True, False]]


def test_allocation_needs_no_scipy() -> None:
    code = "import sys; sys.modules['scipy'] = None; import testbed.policies.bandwidth"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
