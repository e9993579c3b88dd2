from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, Routing, State
from testbed.policies.loading import make_policy
from testbed.policies.nearest_replica import NearestReplica
from testbed.policies.topk import TopK

# by hand: expert 0 everywhere, expert 1 on the two fast devices, expert 2 on the slow one alone, expert 3 nowhere
HOLDS_NE = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], bool)
ROW_S_N = [1.0, 1.2, 3.0]


def block(expert_TK: list[list[int]], row_s_N: list[float], expert_s: float = 0.0) -> tuple[Routing, State]:
    row_s, expert_s_N, nothing_N = np.array(row_s_N), np.full(3, expert_s), np.zeros(3)
    state = State(row_s + expert_s_N, np.ones(3, bool), nothing_N, nothing_N, expert_s_N, row_s)
    weight_TK = np.linspace(0.9, 0.1, np.size(expert_TK)).reshape(np.shape(expert_TK))
    return Routing(0, np.array(expert_TK), weight_TK, HOLDS_NE), state


def rows(policy: NearestReplica, case: tuple[Routing, State]) -> list[int]:
    device_TK = policy.select(*case).device_TK
    return np.bincount(device_TK[device_TK != DROPPED], minlength=3).tolist()


def test_by_latency_each_expert_is_asked_where_one_token_takes_least() -> None:
    case = block([[0, 1], [0, 2], [1, 3]], ROW_S_N)
    answer = NearestReplica("latency").select(*case)
    assert answer.device_TK.tolist() == [[0, 0], [0, 2], [0, DROPPED]]
    np.testing.assert_array_equal(answer.device_TK, TopK().select(*case).device_TK)
    assert answer.weight_TK.tobytes() == TopK().select(*case).weight_TK.tobytes()


def test_by_load_the_rows_of_one_expert_are_spread_so_that_all_are_done_at_about_the_same_time() -> None:
    assert rows(NearestReplica("latency"), block([[0]] * 24, ROW_S_N)) == [24, 0, 0]
    assert rows(NearestReplica("load"), block([[0]] * 24, ROW_S_N)) == [12, 9, 3]


def test_by_load_pairs_without_a_choice_are_placed_first() -> None:
    # the slow device is busy with expert 2 already, so it gets nothing of expert 0
    assert rows(NearestReplica("load"), block([[0], [0], [2], [2]], ROW_S_N)) == [1, 1, 2]


def test_by_load_what_calling_an_expert_costs_counts() -> None:
    assert rows(NearestReplica("load"), block([[0]] * 8, [1.0, 1.0, 1.0], expert_s=2.0)) == [3, 3, 2]
    assert rows(NearestReplica("load"), block([[0]] * 2, [1.0, 1.2, 3.0], expert_s=2.0)) == [1, 1, 0]
    assert rows(NearestReplica("load"), block([[0]] * 2, [1.0, 4.0, 4.0], expert_s=2.0)) == [2, 0, 0]


def test_by_load_a_device_that_is_away_or_unknown_gets_what_nobody_else_holds() -> None:
    routing, state = block([[0], [1], [0], [2]], [1.0, 1.2, math.nan])
    state.available_N[1] = False
    answer = NearestReplica("load").select(routing, state)
    assert answer.device_TK.tolist() == [[0], [0], [0], [2]]


def test_a_greedy_order_that_is_slower_than_asking_the_nearest_is_not_taken() -> None:
    """One by one, the second row of expert 0 is done first on device 1, where expert 1 then waits for it."""
    routing, state = block([[0], [0], [1]], [1.0, 1.05, 10.0])
    holds_NE = np.array([[1, 0], [1, 1], [0, 1]], bool)
    answer = NearestReplica("load").select(replace(routing, holds_NE=holds_NE), state)
    assert answer.device_TK.tolist() == [[0], [0], [1]]


@pytest.mark.parametrize("metric", ["speed", "", None, 1])
def test_an_unknown_metric_is_refused_in_one_line(metric: object) -> None:
    with pytest.raises(ConfigError, match=r'^policy nearest_replica: metric must be "latency" or "load", not [^\n]*$'):
        make_policy("nearest_replica", {"metric": metric})
