from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounds import predicted_s, random_case

from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, Air, IntArray, Policy, Routing, Selection, State
from testbed.policies.drop_late import DropLate
from testbed.policies.dropping import dropped_mass
from testbed.policies.joint import Joint, with_best_shares
from testbed.policies.load_aware import LoadAware
from testbed.policies.loading import make_policy
from testbed.policies.nearest_replica import NearestReplica
from testbed.policies.oracle import Oracle, bound_s
from testbed.policies.strength import Steerable
from testbed.policies.substitute import Substitute
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

DROPPING = [LoadAware(0.1), Joint(0.1), Oracle(0.1)]
STEERED = [WLR(0.2), Substitute(0.2), *DROPPING]
EVERY = [TopK(), DropLate(), NearestReplica("latency"), NearestReplica("load"), *STEERED]

every_policy = pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
steered = pytest.mark.parametrize("policy", STEERED, ids=lambda policy: policy.name)
dropping = pytest.mark.parametrize("policy", DROPPING, ids=lambda policy: policy.name)
few = settings(max_examples=40, deadline=None)


cases = st.integers(0, 2**32 - 1).map(random_case)
awkward_cases = st.integers(0, 2**32 - 1).map(lambda seed: random_case(seed, awkward=True))


def computed(routing: Routing, selection: Selection) -> IntArray:
    return routing.expert_TK if selection.expert_TK is None else selection.expert_TK


@every_policy
@few
@given(case=awkward_cases)
def test_what_is_kept_is_computed_by_an_available_holder(policy: Policy, case: tuple[Routing, State]) -> None:
    routing, state = case
    answer = policy.select(routing, state)
    kept_TK = answer.device_TK != DROPPED
    device_P, expert_P = answer.device_TK[kept_TK], computed(routing, answer)[kept_TK]
    assert state.available_N[device_P].all()
    assert routing.holds_NE[device_P, expert_P].all()
    assert (answer.weight_TK[~kept_TK] == 0).all()


@every_policy
@few
@given(case=awkward_cases)
def test_a_token_that_topk_serves_keeps_an_expert_and_the_sum_of_the_gate(
    policy: Policy, case: tuple[Routing, State]
) -> None:
    answer, topk = policy.select(*case), TopK().select(*case)
    served_T = (topk.device_TK != DROPPED).any(axis=1)
    np.testing.assert_array_equal((answer.device_TK != DROPPED).any(axis=1), served_T)
    np.testing.assert_allclose(answer.weight_TK.sum(axis=1), topk.weight_TK.sum(axis=1), rtol=1e-9)
    assert answer.weight_TK.dtype == topk.weight_TK.dtype


@every_policy
@few
@given(case=cases, seed=st.integers(0, 99))
def test_permuting_tokens_permutes_the_answer(policy: Policy, case: tuple[Routing, State], seed: int) -> None:
    routing, state = case
    order = np.random.default_rng(seed).permutation(len(routing.expert_TK))
    assert routing.score_TE is not None
    permuted = replace(
        routing,
        expert_TK=routing.expert_TK[order],
        weight_TK=routing.weight_TK[order],
        score_TE=routing.score_TE[order],
    )
    before, after = policy.select(routing, state), policy.select(permuted, state)
    np.testing.assert_array_equal(after.device_TK, before.device_TK[order])
    np.testing.assert_array_equal(computed(permuted, after), computed(routing, before)[order])
    np.testing.assert_allclose(after.weight_TK, before.weight_TK[order], rtol=1e-9)


@every_policy
@few
@given(case=cases, seed=st.integers(0, 99))
def test_renaming_devices_renames_them_in_the_answer(policy: Policy, case: tuple[Routing, State], seed: int) -> None:
    routing, state = case
    order = np.random.default_rng(seed).permutation(len(state.available_N))
    air = state.air
    if air is not None:
        snr_hz_WN, row_s_WN = (np.ascontiguousarray(part[:, order]) for part in (air.snr_hz_WN, air.row_s_WN))
        air = Air(air.bandwidth_hz, snr_hz_WN, row_s_WN)
    named_N = (getattr(state, name)[order] for name in State.__slots__ if name != "air")
    before = policy.select(routing, state)
    after = policy.select(replace(routing, holds_NE=routing.holds_NE[order]), State(*named_N, air))
    names = np.append(np.argsort(order), DROPPED)
    np.testing.assert_array_equal(after.device_TK, names[before.device_TK])
    if before.bandwidth_share_N is not None:
        assert after.bandwidth_share_N is not None
        np.testing.assert_allclose(after.bandwidth_share_N, before.bandwidth_share_N[order], rtol=1e-4, atol=1e-6)


@every_policy
@few
@given(case=awkward_cases)
def test_the_same_question_has_the_same_answer_and_stays_as_it_was(policy: Policy, case: tuple[Routing, State]) -> None:
    routing, state = case
    for array in (routing.expert_TK, routing.weight_TK, routing.holds_NE, routing.score_TE, state.row_s_N):
        assert array is not None
        array.flags.writeable = False
    one, other = policy.select(routing, state), policy.select(routing, state)
    assert one.device_TK.tobytes() == other.device_TK.tobytes()
    assert one.weight_TK.tobytes() == other.weight_TK.tobytes()
    assert str(one.bandwidth_share_N) == str(other.bandwidth_share_N)


@steered
@few
@given(case=awkward_cases)
def test_no_strength_is_topk_to_the_bit(policy: Steerable, case: tuple[Routing, State]) -> None:
    weakest, topk = policy.with_strength(0), TopK().select(*case)
    assert isinstance(weakest, Policy)
    answer = weakest.select(*case)
    np.testing.assert_array_equal(answer.device_TK, topk.device_TK)
    assert answer.weight_TK.tobytes() == topk.weight_TK.tobytes()
    assert answer.expert_TK is None


@steered
def test_a_strength_is_the_only_thing_that_steering_changes(policy: Steerable) -> None:
    before = dict(policy.params)
    stronger = policy.with_strength(policy.strongest)
    assert stronger.params == {**before, policy.strength_name: policy.strongest}
    assert policy.params == before
    assert type(stronger) is type(policy)


@dropping
@few
@given(case=awkward_cases, budget=st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0]))
def test_the_budget_holds(policy: Steerable, case: tuple[Routing, State], budget: float) -> None:
    answer = policy.with_strength(budget).select(*case)  # type: ignore[attr-defined]
    assert dropped_mass(*case, answer) <= budget * (1 + 1e-9)


@every_policy
@few
@given(case=awkward_cases)
def test_nothing_is_predicted_to_be_faster_than_the_bound_for_what_it_drops(
    policy: Policy, case: tuple[Routing, State]
) -> None:
    routing, state = case
    answer = policy.select(routing, state)
    if answer.expert_TK is None and (policy.name != "nearest_replica"):  # these move pairs to other devices
        bound = bound_s(routing, state, dropped_mass(routing, state, answer))
        assert not predicted_s(routing, state, answer) < bound * (1 - 1e-9)


@every_policy
@few
@given(case=awkward_cases)
def test_no_block_is_predicted_to_be_slower_than_that_of_topk(policy: Policy, case: tuple[Routing, State]) -> None:
    routing, state = case
    answer, topk = policy.select(routing, state), TopK().select(routing, state)
    if answer.bandwidth_share_N is not None:
        assert answer.bandwidth_share_N.sum() == pytest.approx(1)
        topk = with_best_shares(routing, state, topk.device_TK)
    assert not predicted_s(routing, state, answer) > predicted_s(routing, state, topk) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["load_aware", "joint", "oracle", "substitute"])
@pytest.mark.parametrize("budget", [-0.1, 1.5, math.nan, True, "0.1", None])
def test_an_impossible_budget_is_refused_in_one_line(name: str, budget: object) -> None:
    with pytest.raises(ConfigError, match=rf"^policy {name}: budget must be a number from 0 to 1, not [^\n]*$"):
        make_policy(name, {"budget": budget})


@pytest.mark.parametrize("name", ["load_aware", "joint", "oracle", "substitute", "nearest_replica"])
def test_the_run_file_can_name_it(name: str) -> None:
    policy = make_policy(name, {})
    assert isinstance(policy, Policy)
    assert policy.name == name
