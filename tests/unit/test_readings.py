"""The other readings of Algorithm 1 that examples/readings.py offers differ from ours where they should, only there."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.policies.base import DROPPED, Routing, State
from testbed.policies.loading import make_policy
from testbed.policies.wlr import WLR

THETAS = [0.0, 0.1, 0.2, 0.3, 0.5]


def routed_round(weight_TK: list[list[float]], token_s_N: list[float]) -> tuple[Routing, State]:
    """Every token chooses every expert in order, expert n on device n."""
    weight, token_s, nothing_N = np.array(weight_TK), np.array(token_s_N), np.zeros(len(token_s_N))
    expert_TK = np.broadcast_to(np.arange(len(token_s)), weight.shape)
    available_N = np.ones(len(token_s), bool)
    state = State(token_s, available_N, nothing_N, nothing_N, nothing_N, token_s)
    return Routing(0, expert_TK, weight, np.eye(len(token_s), dtype=bool)), state


def random_round(seed: int) -> tuple[Routing, State]:
    random = np.random.default_rng(seed)
    return routed_round(random.dirichlet([1, 1, 1], 64).tolist(), random.uniform(1e-3, 1e-2, 3).tolist())


@pytest.mark.parametrize("theta", THETAS[1:-1])
def test_at_most_theta_drops_what_below_theta_drops_where_no_kappa_is_theta_exactly(theta: float) -> None:
    routing, state = random_round(seed=1)
    answer = make_policy("examples.readings:WLRAtMost", {"theta": theta}).select(routing, state)
    below = WLR(theta).select(routing, state)
    np.testing.assert_array_equal(answer.device_TK, below.device_TK)
    np.testing.assert_array_equal(answer.weight_TK, below.weight_TK)


def test_at_most_theta_drops_where_kappa_is_theta_but_never_a_tokens_last_pair() -> None:
    routing, state = routed_round([[0.75, 0.25], [0.5, 0.5]], [1.0, 1.0])
    at_a_quarter = make_policy("examples.readings:WLRAtMost", {"theta": 0.25}).select(routing, state)
    at_a_half = make_policy("examples.readings:WLRAtMost", {"theta": 0.5}).select(routing, state)
    assert at_a_quarter.device_TK.tolist() == [[0, DROPPED], [0, 1]]
    assert at_a_half.device_TK.tolist() == [[0, DROPPED], [0, DROPPED]]


def test_a_pair_of_unknown_latency_takes_no_part_in_either_reading() -> None:
    routing, state = routed_round([[0.01, 0.99], [0.5, 0.5]], [np.nan, 1.0])
    for policy in ("WLRAtMost", "WLRSoftmax"):
        answer = make_policy(f"examples.readings:{policy}", {"theta": 0.5}).select(routing, state)
        assert answer.device_TK.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("theta", THETAS)
def test_the_literal_softmax_drops_the_same_pairs_and_evens_out_what_is_left(theta: float) -> None:
    routing, state = random_round(seed=2)
    literal = make_policy("examples.readings:WLRSoftmax", {"theta": theta}).select(routing, state)
    ours = WLR(theta).select(routing, state)
    np.testing.assert_array_equal(literal.device_TK, ours.device_TK)
    np.testing.assert_allclose(literal.weight_TK.sum(axis=1), 1)
    assert (literal.weight_TK.max(axis=1) <= ours.weight_TK.max(axis=1) + 1e-12).all()
