from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounds import load, predicted_s, random_case

from testbed.policies.bandwidth import block_shares
from testbed.policies.base import DROPPED, Routing, Selection, State
from testbed.policies.dropping import block_of, dropped_mass
from testbed.policies.joint import Joint
from testbed.policies.load_aware import LoadAware
from testbed.policies.oracle import Oracle, bound_s

seeds = st.integers(0, 2**32 - 1)


def tiny(seed: int) -> tuple[Routing, State]:
    """At most 6 pairs."""
    routing, state = random_case(seed)
    tokens = slice(0, 6 // routing.expert_TK.shape[1])
    return replace(routing, expert_TK=routing.expert_TK[tokens], weight_TK=routing.weight_TK[tokens]), state


def every_drop_set(routing: Routing, state: State, pairs_TK: np.ndarray) -> list[tuple[float, float]]:
    """(mass, predicted seconds at the best shares) of every way to drop some of these pairs."""
    block, found = block_of(routing, state), []
    for drops in product([False, True], repeat=int(pairs_TK.sum())):
        device_TK = block.device_TK.copy()
        device_TK[pairs_TK] = np.where(drops, DROPPED, device_TK[pairs_TK])
        selection = Selection(device_TK, routing.weight_TK)
        if state.air is not None:
            share_N, _ = block_shares(*load(routing, selection), state)
            selection = replace(selection, bandwidth_share_N=share_N)
        found.append((dropped_mass(routing, state, selection), predicted_s(routing, state, selection)))
    return found


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0, 1))
def test_no_set_of_dropped_pairs_is_faster_than_the_bound_for_its_mass(seed: int, budget: float) -> None:
    routing, state = tiny(seed)
    bound = bound_s(routing, state, budget)
    all_pairs_TK = block_of(routing, state).device_TK != DROPPED
    fastest_s = min(seconds for mass, seconds in every_drop_set(routing, state, all_pairs_TK) if mass <= budget)
    assert fastest_s >= bound * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0, 1))
def test_at_the_even_split_with_one_expert_per_device_it_finds_the_fastest_set(seed: int, budget: float) -> None:
    routing, state = tiny(seed)
    experts = routing.holds_NE.shape[1]
    whole = np.resize(state.row_s_N, experts)
    state = State(whole, np.ones(experts, bool), whole, 0.3 * whole, 0.5 * whole, whole)
    routing = replace(routing, holds_NE=np.eye(experts, dtype=bool))
    found = every_drop_set(routing, state, block_of(routing, state).droppable_TK)
    fastest_s = min(seconds for mass, seconds in found if mass <= budget)
    assert predicted_s(routing, state, Oracle(budget).select(routing, state)) == pytest.approx(fastest_s)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([0.02, 0.1, 0.4]))
def test_at_the_even_split_load_aware_is_no_faster_with_one_expert_per_device(seed: int, budget: float) -> None:
    routing, state = random_case(seed)
    devices = len(state.row_s_N)
    one_each = replace(routing, expert_TK=routing.expert_TK % devices, holds_NE=np.eye(devices, dtype=bool))
    state = replace(state, air=None)
    oracle, load_aware = (policy.select(one_each, state) for policy in (Oracle(budget), LoadAware(budget)))
    assert predicted_s(one_each, state, oracle) <= predicted_s(one_each, state, load_aware) * (1 + 1e-9)


def test_the_bound_falls_with_the_budget_from_the_best_allocation_to_nothing() -> None:
    for seed in range(20):
        routing, state = random_case(seed)
        plain_s = predicted_s(routing, state, Joint(0).select(routing, state))
        bounds_s = [bound_s(routing, state, budget) for budget in (0, 0.05, 0.2, 0.6)]
        assert bounds_s == sorted(bounds_s, reverse=True)
        assert bounds_s[0] == pytest.approx(plain_s, rel=1e-8)
        assert bound_s(routing, state, 1) == pytest.approx(0, abs=1e-12)


def test_the_bound_of_a_block_without_tokens_is_0() -> None:
    routing, state = random_case(0)
    empty = replace(routing, expert_TK=routing.expert_TK[:0], weight_TK=routing.weight_TK[:0])
    assert bound_s(empty, state, 0.1) == 0
    assert Oracle(0.1).select(empty, state).device_TK.shape == (0, routing.expert_TK.shape[1])
