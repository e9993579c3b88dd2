from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounds import predicted_s, random_case

from testbed.policies.base import DROPPED, Routing, State
from testbed.policies.dropping import dropped_mass
from testbed.policies.load_aware import LoadAware
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR


def block(
    expert_TK: list[list[int]],
    weight_TK: list[list[float]],
    row_s_N: list[float],
    expert_s_N: list[float] | None = None,
    base_s_N: list[float] | None = None,
) -> tuple[Routing, State]:
    """Expert n on device n, all available."""
    row_s, devices = np.array(row_s_N), len(row_s_N)
    expert_s, base_s = (np.zeros(devices) if cost is None else np.array(cost) for cost in (expert_s_N, base_s_N))
    state = State(base_s + expert_s + row_s, np.ones(devices, bool), np.zeros(devices), base_s, expert_s, row_s)
    return Routing(0, np.array(expert_TK), np.array(weight_TK), np.eye(devices, dtype=bool)), state


def test_only_the_slowest_device_loses_pairs_and_the_lightest_go_first() -> None:
    case = block([[1, 0], [2, 0], [1, 0], [2, 1]], [[0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.99, 0.01]], [3.0, 1.0, 1.0])
    assert LoadAware(0.03).select(*case).device_TK.tolist() == [[1, 0], [2, DROPPED], [1, 0], [2, 1]]
    assert LoadAware(0.08).select(*case).device_TK.tolist() == [[1, 0], [2, DROPPED], [1, DROPPED], [2, 1]]


def test_when_another_device_becomes_the_slowest_it_is_the_one_to_lose() -> None:
    case = block([[2, 0], [2, 0], [2, 1], [2, 1]], [[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.7, 0.3]], [3.0, 2.5, 0.1])
    assert LoadAware(0.05).select(*case).device_TK.tolist() == [[2, DROPPED], [2, 0], [2, DROPPED], [2, 1]]


def test_of_two_equally_slow_devices_both_are_relieved_or_none() -> None:
    case = block([[2, 0], [2, 1]], [[0.9, 0.1], [0.9, 0.1]], [1.0, 1.0, 0.1])
    assert LoadAware(0.05).select(*case).device_TK.tolist() == [[2, 0], [2, 1]]
    assert LoadAware(0.1).select(*case).device_TK.tolist() == [[2, DROPPED], [2, DROPPED]]


def test_where_calling_an_expert_is_what_costs_it_goes_with_all_its_rows_or_not_at_all() -> None:
    routing, state = block([[1, 0], [1, 0], [1, 2]], [[0.9, 0.1], [0.8, 0.2], [0.96, 0.04]], [0.0] * 3, [5.0, 1.0, 1.0])
    holds_NE = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)  # experts 0 and 2 on device 0
    case = (Routing(0, routing.expert_TK, routing.weight_TK, holds_NE), state)
    assert LoadAware(0.01).select(*case).device_TK.tolist() == [[1, 0], [1, 0], [1, 0]]
    assert LoadAware(0.05).select(*case).device_TK.tolist() == [[1, 0], [1, 0], [1, DROPPED]]
    assert LoadAware(0.12).select(*case).device_TK.tolist() == [[1, DROPPED], [1, DROPPED], [1, DROPPED]]


def test_a_device_is_left_altogether_for_what_a_round_costs_it() -> None:
    case = block([[1, 0], [1, 0]], [[0.9, 0.1], [0.8, 0.2]], [0.0, 1.0], base_s_N=[9.0, 0.0])
    assert LoadAware(0.15).select(*case).device_TK.tolist() == [[1, DROPPED], [1, DROPPED]]
    assert LoadAware(0.14).select(*case).device_TK.tolist() == [[1, 0], [1, 0]]


def test_a_token_keeps_its_heaviest_available_pair() -> None:
    routing, state = block([[0, 1], [0, 1]], [[0.6, 0.4], [0.4, 0.6]], [9.0, 1.0])
    state.available_N[:] = [True, False]
    assert LoadAware(1).select(routing, state).device_TK.tolist() == [[0, DROPPED], [0, DROPPED]]


def test_a_device_of_unknown_cost_is_neither_waited_for_nor_relieved() -> None:
    case = block([[1, 0], [2, 1]], [[0.9, 0.1], [0.9, 0.1]], [math.nan, 2.0, 1.0])
    assert LoadAware(1).select(*case).device_TK.tolist() == [[1, 0], [2, DROPPED]]


def test_a_weight_counts_as_the_share_of_its_token() -> None:
    case = block([[1, 0], [1, 0]], [[1.8, 0.2], [0.7, 0.3]], [3.0, 1.0])
    assert LoadAware(0.05).select(*case).device_TK.tolist() == [[1, DROPPED], [1, 0]]
    assert dropped_mass(*case, LoadAware(0.05).select(*case)) == pytest.approx(0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 1.0]))
def test_no_single_pair_could_come_back_for_nothing(seed: int, budget: float) -> None:
    routing, state = random_case(seed, awkward=True)
    topk, answer = TopK().select(routing, state), LoadAware(budget).select(routing, state)
    block_s = predicted_s(routing, state, answer)
    for pair in zip(*np.nonzero(answer.device_TK != topk.device_TK), strict=True):
        answer.device_TK[pair] = topk.device_TK[pair]
        assert predicted_s(routing, state, answer) > block_s
        answer.device_TK[pair] = DROPPED


def test_at_equal_dropped_mass_synthetic_blocks_gain_more_than_with_wlr() -> None:
    plain_s, wlr_s, load_aware_s = 0.0, 0.0, 0.0
    for seed in range(30):
        routing, state = synthetic_prefill(seed)
        wlr = WLR(0.2).select(routing, state)
        load_aware = LoadAware(dropped_mass(routing, state, wlr)).select(routing, state)
        plain_s += predicted_s(routing, state, TopK().select(routing, state))
        wlr_s += predicted_s(routing, state, wlr)
        load_aware_s += predicted_s(routing, state, load_aware)
    assert plain_s - load_aware_s > 1.3 * (plain_s - wlr_s)


def synthetic_prefill(seed: int) -> tuple[Routing, State]:
    """128 tokens, top 2 of 8 experts that are not equally popular, on devices from 0.5 to 20 times as fast as one."""
    rng = np.random.default_rng(seed)
    logit_TE = 2 * rng.normal(size=(128, 8)) + 0.8 * rng.normal(size=8)
    expert_TK = np.argsort(-logit_TE, axis=1)[:, :2]
    weight_TK = np.exp(np.take_along_axis(logit_TE, expert_TK, axis=1))
    row_s_N, nothing_N = 1e-3 * rng.uniform(0.5, 2, 8) + 1e-4 / rng.uniform(0.5, 20, 8), np.zeros(8)
    state = State(row_s_N, np.ones(8, bool), nothing_N, nothing_N, nothing_N, row_s_N)
    return Routing(0, expert_TK, weight_TK / weight_TK.sum(axis=1, keepdims=True), np.eye(8, dtype=bool)), state
