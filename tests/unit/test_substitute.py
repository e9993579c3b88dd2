from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounds import predicted_s, random_case

from testbed.errors import ConfigError
from testbed.policies.base import Routing, State
from testbed.policies.dropping import block_of
from testbed.policies.loading import make_policy
from testbed.policies.substitute import Substitute
from testbed.policies.topk import TopK


def one_choice_each(score_TE: list[list[float]], row_s_N: list[float]) -> tuple[Routing, State]:
    """Top 1; expert n on device n; the weight is the score."""
    score, row_s, nothing_N = np.array(score_TE), np.array(row_s_N), np.zeros(len(row_s_N))
    expert_TK = np.argmax(score, axis=1)[:, None]
    state = State(row_s, np.ones(len(row_s), bool), nothing_N, nothing_N, nothing_N, row_s)
    routing = Routing(5, expert_TK, np.take_along_axis(score, expert_TK, axis=1), np.eye(len(row_s), dtype=bool), score)
    return routing, state


def chosen(policy: Substitute, case: tuple[Routing, State]) -> list[int]:
    answer = policy.select(*case)
    expert_TK = case[0].expert_TK if answer.expert_TK is None else answer.expert_TK
    np.testing.assert_array_equal(answer.device_TK, expert_TK)  # expert n is on device n
    return expert_TK[:, 0].tolist()


def test_a_pair_of_the_slowest_device_goes_to_the_next_best_expert() -> None:
    case = one_choice_each([[0.4, 0.25, 0.35], [0.5, 0.1, 0.4]], [5.0, 1.0, 1.0])
    assert chosen(Substitute(0.5, 0.5), case) == [2, 0]
    assert chosen(Substitute(1.0, 0.5), case) == [2, 2]


def test_a_next_best_expert_whose_device_is_away_unknown_or_no_sooner_done_is_passed_over() -> None:
    score_TE = [[0.4, 0.35, 0.3, 0.25, 0.2]]
    case = one_choice_each(score_TE, [5.0, 1.0, math.nan, 5.0, 1.0])
    case[1].available_N[1] = False
    assert chosen(Substitute(1.0, 0.5), case) == [4]
    assert chosen(Substitute(1.0, 0.6), case) == [0]


def test_an_expert_that_the_token_has_already_is_no_substitute() -> None:
    routing, state = one_choice_each([[0.5, 0.4, 0.3]], [5.0, 1.0, 1.0])
    both = Routing(5, np.array([[0, 1]]), np.array([[0.5, 0.4]]), routing.holds_NE, routing.score_TE)
    answer = Substitute(1.0, 0.5).select(both, state)
    assert answer.expert_TK is not None
    assert answer.expert_TK.tolist() == [[2, 1]]
    np.testing.assert_allclose(answer.weight_TK, np.array([[0.3, 0.4]]) * 0.9 / 0.7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_keep_their_dtype_and_other_tokens_their_bits(dtype: type[np.floating[Any]]) -> None:
    routing, state = random_case(7)
    routing = Routing(0, routing.expert_TK, routing.weight_TK.astype(dtype), routing.holds_NE, routing.score_TE)
    answer = Substitute(0.3, 0.1).select(routing, state)
    assert answer.expert_TK is not None
    same_T = (answer.expert_TK == routing.expert_TK).all(axis=1)
    assert not same_T.all()
    assert answer.weight_TK.dtype == dtype
    assert answer.weight_TK[same_T].tobytes() == routing.weight_TK[same_T].tobytes()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_block_gets_faster_within_the_budget_and_the_ratio(seed: int, budget: float, min_ratio: float) -> None:
    routing, state = random_case(seed, awkward=True)
    answer = Substitute(budget, min_ratio).select(routing, state)
    if answer.expert_TK is None:
        return
    assert routing.score_TE is not None
    topk, block = TopK().select(routing, state), block_of(routing, state)
    new_TK = answer.expert_TK != routing.expert_TK
    token, choice = np.nonzero(new_TK)
    assert predicted_s(routing, state, answer) < predicted_s(routing, state, topk)
    assert block.mass_TK[new_TK].sum() <= budget * block.total_mass * (1 + 1e-9)
    ratio = routing.score_TE[token, answer.expert_TK[new_TK]] / routing.score_TE[token, routing.expert_TK[new_TK]]
    assert (ratio >= min_ratio * (1 - 1e-12)).all()
    assert all(answer.expert_TK[t, k] not in routing.expert_TK[t] for t, k in zip(token, choice, strict=True))
    np.testing.assert_array_equal(answer.device_TK == -1, topk.device_TK == -1)


def test_a_gate_that_gives_no_scores_is_named_in_one_line() -> None:
    routing, state = one_choice_each([[0.6, 0.4]], [2.0, 1.0])
    silent = Routing(5, routing.expert_TK, routing.weight_TK, routing.holds_NE)
    with pytest.raises(ConfigError, match=r"^policy substitute: the gate of layer 5 does not tell[^\n]*$"):
        Substitute().select(silent, state)


@pytest.mark.parametrize("min_ratio", [-0.1, 1.1, math.nan, True, "0.5"])
def test_an_impossible_ratio_is_refused_in_one_line(min_ratio: object) -> None:
    with pytest.raises(ConfigError, match=r"^policy substitute: min_ratio must be a number from 0 to 1, not [^\n]*$"):
        make_policy("substitute", {"min_ratio": min_ratio})
