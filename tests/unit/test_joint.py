from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounds import load, predicted_s, random_case

from testbed.policies.bandwidth import block_shares
from testbed.policies.base import DROPPED, Air, Routing, State
from testbed.policies.joint import Joint, with_best_shares
from testbed.policies.load_aware import LoadAware
from testbed.policies.oracle import bound_s
from testbed.policies.topk import TopK

seeds = st.integers(0, 2**32 - 1)


def shaped(row_air_s_N: list[float], work_s_N: list[float]) -> State:
    """Links that are shaped to bit/s, each way half of the time at the even split."""
    air_s_N, work_s = np.array(row_air_s_N), np.array(work_s_N)
    devices = len(air_s_N)
    air = Air(1e8, np.full((2, devices), np.inf), np.tile(air_s_N / 2, (2, 1)))
    nothing_N = np.zeros(devices)
    return State(air_s_N + work_s, np.ones(devices, bool), nothing_N, nothing_N, nothing_N, air_s_N + work_s, air)


def radio_prefill(seed: int) -> tuple[Routing, State]:
    """Synthetic: 256 tokens, top 2 of 8, radio links that differ a thousandfold in SNR."""
    rng = np.random.default_rng(seed)
    logit_TE = 2 * rng.normal(size=(256, 8)) + rng.normal(size=8)
    expert_TK = np.argsort(-logit_TE, axis=1)[:, :2]
    weight_TK = np.exp(np.take_along_axis(logit_TE, expert_TK, axis=1))
    snr_hz_WN = 10 ** rng.uniform(7, 10, (2, 8))
    part_hz, nothing_N = 100e6 / 8, np.zeros(8)
    air = Air(100e6, snr_hz_WN, 32768 / (part_hz * np.log2(1 + snr_hz_WN / part_hz)))
    row_s_N = air.row_s_WN.sum(axis=0) + 10 ** rng.uniform(-4.5, -3, 8)
    state = State(row_s_N, np.ones(8, bool), nothing_N, nothing_N, nothing_N, row_s_N, air)
    return Routing(0, expert_TK, weight_TK / weight_TK.sum(axis=1, keepdims=True), np.eye(8, dtype=bool)), state


def test_without_a_budget_it_shares_the_band_as_well_as_can_be() -> None:
    routing, state = radio_prefill(0)
    answer = Joint(0).select(routing, state)
    share_N, seconds = block_shares(*load(routing, answer), state)
    np.testing.assert_array_equal(answer.bandwidth_share_N, share_N)
    assert predicted_s(routing, state, answer) == pytest.approx(seconds)
    assert seconds < predicted_s(routing, state, TopK().select(routing, state))


def test_a_row_goes_from_any_device_where_that_frees_most_time_per_mass() -> None:
    routing = Routing(
        0, np.array([[2, 0], [2, 1], [2, 0]]), np.array([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2]]), np.eye(3, dtype=bool)
    )
    # device 0 is the slowest at the even split, but a row of device 1 takes more of the band
    answer = Joint(0.034).select(routing, shaped([2.0, 3.0, 0.1], [0.0, 0.0, 0.0]))
    assert answer.device_TK.tolist() == [[2, 0], [2, DROPPED], [2, 0]]
    at_the_even_split = LoadAware(0.034).select(routing, shaped([2.0, 3.0, 0.1], [0.0, 0.0, 0.0]))
    assert at_the_even_split.device_TK.tolist() == [[2, DROPPED], [2, 1], [2, 0]]


def test_where_computing_decides_only_that_device_is_relieved() -> None:
    routing = Routing(0, np.array([[2, 0], [2, 1], [2, 0]]), np.full((3, 2), [0.9, 0.1]), np.eye(3, dtype=bool))
    answer = Joint(0.07).select(routing, shaped([1e-3, 1.0, 1e-3], [50.0, 0.0, 0.0]))
    assert (answer.device_TK[:, 1] == DROPPED).tolist() == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_without_a_band_it_is_load_aware(seed: int) -> None:
    routing, state = random_case(seed, awkward=True)
    joint, load_aware = (policy.select(routing, replace(state, air=None)) for policy in (Joint(0.1), LoadAware(0.1)))
    np.testing.assert_array_equal(joint.device_TK, load_aware.device_TK)
    assert joint.bandwidth_share_N is None


def test_more_budget_makes_synthetic_blocks_faster() -> None:
    for seed in range(5):
        routing, state = radio_prefill(seed)
        times_s = [predicted_s(routing, state, Joint(budget).select(routing, state)) for budget in (0, 0.01, 0.05, 0.2)]
        assert times_s == sorted(times_s, reverse=True)


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05, 0.1])
def test_synthetic_blocks_come_within_two_percent_of_the_bound(budget: float) -> None:
    for seed in range(5):
        routing, state = radio_prefill(seed)
        bound = bound_s(routing, state, budget)
        assert predicted_s(routing, state, Joint(budget).select(routing, state)) <= 1.02 * bound


def test_a_device_with_few_rows_is_not_stripped_of_them_for_its_narrow_link() -> None:
    """What happens where weights are compared with allocated rates."""
    routing, state = radio_prefill(1)
    before_N, _ = load(routing, TopK().select(routing, state))
    after_N, _ = load(routing, Joint(0.05).select(routing, state))
    assert after_N[np.argmin(before_N)] > 0


def test_a_link_that_is_not_known_keeps_its_even_part_and_its_rows() -> None:
    routing, state = radio_prefill(2)
    assert state.air is not None
    state.air.snr_hz_WN[:, 3] = np.nan
    answer, topk = Joint(0.05).select(routing, state), TopK().select(routing, state)
    assert answer.bandwidth_share_N is not None
    assert answer.bandwidth_share_N[3] == 1 / 8
    plain = with_best_shares(routing, state, topk.device_TK)
    assert predicted_s(routing, state, answer) < predicted_s(routing, state, plain)


def test_where_no_link_is_known_the_slowest_device_at_the_even_split_is_relieved() -> None:
    routing, state = radio_prefill(3)
    assert state.air is not None
    state.air.snr_hz_WN[:] = np.nan
    answer = Joint(0.05).select(routing, state)
    dropped_TK = answer.device_TK == DROPPED
    slowest = np.argmax(state.cost_s_N(*load(routing, TopK().select(routing, state))))
    assert dropped_TK.any()
    assert (routing.expert_TK[dropped_TK] == slowest).any()
