from __future__ import annotations

import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, BoolArray, FloatArray, IntArray, Policy, Routing, Selection, State
from testbed.policies.loading import label, make_policy
from testbed.policies.selection import (
    arrived_weights,
    device_of_pair,
    dropped_share,
    finish,
    rescale,
    routed,
    surviving_weights,
)
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

ROOT = Path(__file__).parents[2]
WEIGHT = st.just(0.0) | st.floats(2**-20, 2, width=32)
LATENCY_S = st.just(math.nan) | st.sampled_from([1e-3, 2e-3, 4e-3]) | st.floats(1e-4, 10)
THETA = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]) | st.floats(0, 0.5)


def state_of(token_s_N: FloatArray, available_N: BoolArray) -> State:
    nothing_N = np.zeros(len(token_s_N))
    return State(token_s_N, available_N, nothing_N, nothing_N, nothing_N, token_s_N)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Routing, State]:
    """Replicas, experts nobody holds, ids that mean "no expert", devices that are away, unknown latencies."""
    tokens, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts, devices = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    routing = Routing(
        layer=0,
        expert_TK=draw(hnp.arrays(np.int64, (tokens, k), elements=st.integers(0, experts + 1))),
        weight_TK=draw(hnp.arrays(np.float64, (tokens, k), elements=WEIGHT)).astype(dtype),
        holds_NE=draw(hnp.arrays(bool, (devices, experts))),
    )
    token_s_N = draw(hnp.arrays(np.float64, devices, elements=LATENCY_S))
    return routing, state_of(token_s_N, draw(hnp.arrays(bool, devices)))


def identity_round(weight_TK: list[list[float]], token_s_N: list[float]) -> tuple[Routing, State]:
    """Every token chooses every expert in order, expert n on device n."""
    weight = np.array(weight_TK)
    devices = len(token_s_N)
    expert_TK = np.broadcast_to(np.arange(devices), weight.shape)
    routing = Routing(0, expert_TK, weight, np.eye(devices, dtype=bool))
    return routing, state_of(np.array(token_s_N), np.ones(devices, bool))


# --- the slow, obvious reference ---


def best_device(expert: int, routing: Routing, state: State) -> int:
    devices, experts = routing.holds_NE.shape
    best = DROPPED
    for n in range(devices):
        if expert >= experts or not (routing.holds_NE[n, expert] and state.available_N[n]):
            continue
        known = not math.isnan(state.token_s_N[n])
        best_known = best != DROPPED and not math.isnan(state.token_s_N[best])
        if best == DROPPED or (known and not best_known) or (known and state.token_s_N[n] < state.token_s_N[best]):
            best = n
    return best


def reference_token(weights: list[float], devices: list[int], token_s_N: FloatArray, theta: float) -> list[int]:
    kept = list(devices)
    while True:
        ratios = {k: weights[k] / token_s_N[n] for k, n in enumerate(kept) if n != DROPPED}
        ratios = {k: ratio for k, ratio in ratios.items() if not math.isnan(ratio)}
        if len(ratios) < 2 or max(ratios.values()) == 0:
            return kept
        smallest = min(ratios, key=lambda k: ratios[k])
        kappa = ratios[smallest] / (ratios[smallest] + max(ratios.values()))
        if kappa >= theta:
            return kept
        kept[smallest] = DROPPED


def reference(routing: Routing, state: State, theta: float) -> tuple[IntArray, FloatArray]:
    device_TK, weight_TK = [], []
    experts_E = routing.holds_NE.shape[1]
    for experts, weights in zip(routing.expert_TK.tolist(), routing.weight_TK.tolist(), strict=True):
        candidates = [best_device(expert, routing, state) for expert in experts]
        devices = reference_token(weights, candidates, state.token_s_N, theta)
        total = sum(weight for weight, expert in zip(weights, experts, strict=True) if expert < experts_E)
        left = sum(weight for weight, device in zip(weights, devices, strict=True) if device != DROPPED)
        factor = total / left if left else 0.0
        device_TK.append(devices)
        weight_TK.append([w * factor if n != DROPPED else 0.0 for w, n in zip(weights, devices, strict=True)])
    return np.array(device_TK), np.array(weight_TK)


# --- Algorithm 1 ---


@settings(max_examples=400, deadline=None)
@given(rounds(), THETA)
def test_wlr_is_algorithm_1_done_token_by_token(case: tuple[Routing, State], theta: float) -> None:
    answer = WLR(theta).select(*case)
    device_TK, weight_TK = reference(*case, theta)
    np.testing.assert_array_equal(answer.device_TK, device_TK)
    np.testing.assert_allclose(answer.weight_TK, weight_TK, rtol=1e-6)
    assert answer.weight_TK.dtype == case[0].weight_TK.dtype


@settings(deadline=None)
@given(rounds())
def test_theta_0_is_topk_to_the_bit(case: tuple[Routing, State]) -> None:
    wlr, topk = WLR(0).select(*case), TopK().select(*case)
    np.testing.assert_array_equal(wlr.device_TK, topk.device_TK)
    assert wlr.weight_TK.tobytes() == topk.weight_TK.tobytes()


@settings(deadline=None)
@given(rounds(), THETA, st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_answer(case: tuple[Routing, State], theta: float, random: Random) -> None:
    routing, state = case
    order = list(range(len(routing.expert_TK)))
    random.shuffle(order)
    permuted = Routing(0, routing.expert_TK[order], routing.weight_TK[order], routing.holds_NE)
    before, after = WLR(theta).select(routing, state), WLR(theta).select(permuted, state)
    np.testing.assert_array_equal(after.device_TK, before.device_TK[order])
    np.testing.assert_array_equal(after.weight_TK, before.weight_TK[order])


@settings(deadline=None)
@given(rounds(), THETA, st.integers(-20, 20), st.integers(-20, 20))
def test_a_common_factor_on_latencies_or_on_weights_decides_nothing(
    case: tuple[Routing, State], theta: float, time_power: int, weight_power: int
) -> None:
    routing, state = case
    weight_TK = (routing.weight_TK * 2.0**weight_power).astype(routing.weight_TK.dtype)  # powers of two: exact
    scaled = Routing(0, routing.expert_TK, weight_TK, routing.holds_NE)
    slower = state_of(state.token_s_N * 2.0**time_power, state.available_N)
    answer = WLR(theta).select(scaled, slower)
    np.testing.assert_array_equal(answer.device_TK, WLR(theta).select(routing, state).device_TK)


@settings(deadline=None)
@given(rounds(), THETA)
def test_survivors_keep_the_sum_of_their_token_and_intact_tokens_their_bits(
    case: tuple[Routing, State], theta: float
) -> None:
    routing, state = case
    answer = WLR(theta).select(routing, state)
    gate_TK = np.where(routed(routing), routing.weight_TK, 0)
    survives_T = ((answer.device_TK != DROPPED) & (gate_TK > 0)).any(axis=1)
    expected_T = np.where(survives_T, gate_TK.sum(axis=1), 0)
    np.testing.assert_allclose(answer.weight_TK.sum(axis=1), expected_T, rtol=1e-6)
    intact_T = ((answer.device_TK != DROPPED) == routed(routing)).all(axis=1)
    assert answer.weight_TK[intact_T].tobytes() == gate_TK[intact_T].tobytes()


@settings(deadline=None)
@given(rounds(), THETA, THETA)
def test_a_larger_theta_keeps_no_pair_that_a_smaller_one_drops(
    case: tuple[Routing, State], one: float, other: float
) -> None:
    low, high = (WLR(theta).select(*case).device_TK != DROPPED for theta in sorted((one, other)))
    assert not (high & ~low).any()


@settings(deadline=None)
@given(rounds(), THETA)
def test_wlr_orphans_no_token_that_topk_serves(case: tuple[Routing, State], theta: float) -> None:
    served_by_topk_T = (TopK().select(*case).device_TK != DROPPED).any(axis=1)
    served_by_wlr_T = (WLR(theta).select(*case).device_TK != DROPPED).any(axis=1)
    np.testing.assert_array_equal(served_by_wlr_T, served_by_topk_T)


@pytest.mark.parametrize("percent", range(5, 55, 5))
def test_kappa_equal_to_theta_is_kept(percent: int) -> None:
    theta = percent / 100
    routing, state = identity_round([[1 - theta, theta]], [1.0, 1.0])
    assert WLR(theta).select(routing, state).device_TK.tolist() == [[0, 1]]


def test_the_loop_repeats_until_kappa_reaches_theta() -> None:
    routing, state = identity_round([[0.4, 0.3, 0.2, 0.1]], [1e-3, 2e-3, 4e-3, 8e-3])
    # WLR 400, 150, 50, 12.5: kappa of the smallest against 400 is 0.03, 0.11, 0.27
    assert WLR(0.1).select(routing, state).device_TK.tolist() == [[0, 1, 2, DROPPED]]
    assert WLR(0.2).select(routing, state).device_TK.tolist() == [[0, 1, DROPPED, DROPPED]]
    answer = WLR(0.3).select(routing, state)
    assert answer.device_TK.tolist() == [[0, DROPPED, DROPPED, DROPPED]]
    np.testing.assert_allclose(answer.weight_TK, [[1.0, 0.0, 0.0, 0.0]])


def test_pairs_of_equal_ratio_share_one_fate() -> None:
    routing, state = identity_round([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.4, 0.4, 0.4]], [1.0, 1.0, 1.0])
    kept_TK = WLR(0.2).select(routing, state).device_TK != DROPPED
    assert kept_TK.tolist() == [[True, False, False], [False, True, False], [True, True, True]]


def test_an_unknown_latency_is_neither_dropped_nor_compared_with() -> None:
    routing, state = identity_round([[0.98, 0.01, 0.01]], [math.nan, 1e-3, 5e-3])
    assert WLR(0.3).select(routing, state).device_TK.tolist() == [[0, 1, DROPPED]]


@pytest.mark.parametrize("no_latency", [0.0, -1.0, math.inf])
def test_what_cannot_be_a_latency_counts_as_unknown(no_latency: float) -> None:
    routing, state = identity_round([[0.5, 0.4, 0.1]], [no_latency, 1e-3, 9e-3])
    assert WLR(0.2).select(routing, state).device_TK.tolist() == [[0, 1, DROPPED]]
    anywhere = Routing(0, routing.expert_TK, routing.weight_TK, np.ones((3, 3), bool))
    assert TopK().select(anywhere, state).device_TK.tolist() == [[1, 1, 1]]


def test_a_token_without_any_weight_is_left_alone() -> None:
    routing, state = identity_round([[0.0, 0.0]], [1.0, 2.0])
    answer = WLR(0.5).select(routing, state)
    assert answer.device_TK.tolist() == [[0, 1]]
    assert answer.weight_TK.tolist() == [[0.0, 0.0]]


def test_a_block_without_tokens_has_an_empty_answer() -> None:
    routing, state = identity_round([[0.5, 0.5]], [1.0, 2.0])
    empty = Routing(0, routing.expert_TK[:0], routing.weight_TK[:0], routing.holds_NE)
    for policy in (TopK(), WLR(0.2)):
        assert policy.select(empty, state).device_TK.shape == (0, 2)


@pytest.mark.parametrize("theta", [-0.01, 0.51, math.nan, math.inf, "0.2", None, True])
def test_a_theta_outside_the_range_of_kappa_is_refused_in_one_line(theta: object) -> None:
    with pytest.raises(ConfigError, match=r"^policy wlr: theta must be a number from 0 to 0\.5[^\n]*$"):
        WLR(theta)  # type: ignore[arg-type]


# --- what all policies share ---


def test_the_fastest_available_holder_serves_an_expert() -> None:
    holds_NE = np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 0]], bool)
    token_s_N = np.array([np.nan, 2e-3, 2e-3, 1e-3])
    routing = Routing(0, np.array([[0, 1, 2, 3, 4, 5, -1]]), np.ones((1, 7)), holds_NE)
    state = state_of(token_s_N, np.array([True, True, True, False]))
    # a tie to the lowest index; unknown last, but used; the fastest of all is away
    assert device_of_pair(routing, state).tolist() == [[1, 1, 0, DROPPED, 2, DROPPED, DROPPED]]


def test_a_tie_goes_to_the_lowest_index_in_a_large_fleet_too() -> None:
    routing = Routing(0, np.zeros((1, 1), int), np.ones((1, 1)), np.ones((300, 1), bool))
    state = state_of(np.tile([2e-3, 1e-3], 150), np.ones(300, bool))
    assert device_of_pair(routing, state).tolist() == [[1]]


def test_topk_drops_only_pairs_without_a_device() -> None:
    routing, state = identity_round([[0.6, 0.3, 0.1]], [1.0, 1.0, 1.0])
    state.available_N[1] = False
    answer = TopK().select(routing, state)
    assert answer.device_TK.tolist() == [[0, DROPPED, 2]]
    np.testing.assert_allclose(answer.weight_TK, [[6 / 7, 0, 1 / 7]])


def test_an_id_that_names_no_expert_is_not_part_of_the_routing() -> None:
    routing, state = identity_round([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], [1.0, 1.0, 1.0])
    ids = Routing(0, np.array([[0, 1, 3], [0, -2, 7]]), routing.weight_TK, routing.holds_NE)
    assert routed(ids).tolist() == [[True, True, False], [True, False, False]]
    answer = TopK().select(ids, state)
    assert answer.device_TK.tolist() == [[0, 1, DROPPED], [0, DROPPED, DROPPED]]
    assert answer.weight_TK.tolist() == [[0.1, 0.7, 0.0], [0.5, 0.0, 0.0]]  # 0.1 / 0.8 * 0.8 is not 0.1
    dropped = finish(ids, np.array([[0, DROPPED, DROPPED], [DROPPED, DROPPED, DROPPED]]))
    np.testing.assert_allclose(dropped.weight_TK, np.array([[0.8, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rescaling_keeps_the_dtype_and_the_bits_of_intact_rows(dtype: type[np.floating[Any]]) -> None:
    weight_TK: FloatArray = np.array([[0.1, -0.0], [0.7, 0.1], [0.7, 0.1], [0.7, 0.0], [np.nan, 0.5]], dtype)
    kept_TK = np.array([[1, 1], [0, 1], [0, 0], [0, 1], [1, 1]], bool)
    scaled_TK = rescale(weight_TK, kept_TK)
    assert scaled_TK.dtype == dtype
    assert scaled_TK[[0, 4]].tobytes() == weight_TK[[0, 4]].tobytes()
    np.testing.assert_allclose(scaled_TK[1:4], np.array([[0, 0.8], [0, 0], [0, 0]]), rtol=2e-3)


def test_a_policy_changes_nothing_of_what_it_is_given() -> None:
    routing, state = identity_round([[0.9, 0.1]], [1e-3, 9e-3])
    for array in (routing.weight_TK, routing.holds_NE, state.token_s_N, state.available_N):
        array.flags.writeable = False
    assert WLR(0.3).select(routing, state).device_TK.tolist() == [[0, DROPPED]]


# --- from the run file's words to a policy ---


@pytest.mark.parametrize(
    ("name", "params", "said"), [("topk", {}, "topk"), ("wlr", {"theta": 0.3}, "wlr θ=0.3"), ("wlr", {}, "wlr θ=0.2")]
)
def test_a_built_in_policy_is_made_by_name_and_called_by_its_label(
    name: str, params: dict[str, object], said: str
) -> None:
    policy = make_policy(name, params)
    assert isinstance(policy, Policy)
    assert label(policy.name, policy.params) == said


def test_the_example_policy_drops_light_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path_before = list(sys.path)
    policy = make_policy("examples.my_policy:MinimumWeight", {"minimum": 0.25})
    assert sys.path == path_before
    assert label(policy.name, policy.params) == "minimum_weight minimum=0.25"
    answer = policy.select(*identity_round([[0.9, 0.1], [0.6, 0.4]], [1.0, 1.0]))
    assert isinstance(answer, Selection)
    assert answer.device_TK.tolist() == [[0, DROPPED], [0, 1]]
    assert answer.weight_TK.tolist() == [[1.0, 0.0], [0.6, 0.4]]


@settings(deadline=None)
@given(case=rounds())
def test_the_example_policy_orphans_no_token_that_topk_serves(case: tuple[Routing, State]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        policy = make_policy("examples.my_policy:MinimumWeight", {})
    served_T = (TopK().select(*case).device_TK != DROPPED).any(axis=1)
    np.testing.assert_array_equal((policy.select(*case).device_TK != DROPPED).any(axis=1), served_T)


OWN_MODULE = """
class Fine:
    name, params = "fine", {}
    def select(self, routing, state): ...
class Nameless:
    def select(self, routing, state): ...
class Selectless:
    name, params = "selectless", {}
class Picky:
    name, params = "picky", {}
    def __init__(self, **anything): raise ValueError("two\\nlines")
    def select(self, routing, state): ...
class Needy(Fine):
    def __init__(self, rate): ...
not_a_class = 3
"""


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policies.py").write_text(OWN_MODULE)
    (tmp_path / "own_broken.py").write_text("def (:\n")
    (tmp_path / "own_failing.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_policies", raising=False)


@pytest.mark.usefixtures("own_modules")
def test_a_policy_is_found_in_the_working_directory() -> None:
    assert make_policy("own_policies:Fine", {}).name == "fine"


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("wrl", {}, 'no policy "wrl" (did you mean "wlr"?); built in: topk, wlr'),
        ("greedy-joint", {}, "built in: topk, wlr"),
        ("wlr", {"tetha": 0.2}, 'policy wlr has no parameter "tetha" (did you mean "theta"?); allowed: theta'),
        ("topk", {"theta": 0.2}, 'policy topk has no parameter "theta"; it takes none'),
        ("wlr", {"theta": 0.7}, "theta must be a number from 0 to 0.5"),
        ("own_policies:fine", {}, "has no class 'fine' (did you mean \"Fine\"?)"),
        ("own_policies:not_a_class", {}, "has no class 'not_a_class'"),
        ("own_policies:", {}, "has no class ''"),
        ("own_policies:Selectless", {}, "needs a method select(routing, state)"),
        ("own_policies:Nameless", {}, "has no name and no params"),
        ("own_policies:Picky", {"x": 1}, "two lines"),
        ("own_policies:Needy", {}, "'rate'"),
        ("own_nowhere:Fine", {}, "cannot import 'own_nowhere'"),
        ("own_broken:Fine", {}, "SyntaxError"),
        ("own_failing:Fine", {}, "first line second line"),
        (":Fine", {}, "cannot import ''"),
        (".own_policies:Fine", {}, "cannot import '.own_policies'"),
    ],
)
def test_a_wrong_policy_is_refused_in_one_line_that_helps(name: str, params: dict[str, object], says: str) -> None:
    path_before = list(sys.path)
    with pytest.raises(ConfigError) as refused:
        make_policy(name, params)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sys.path == path_before


# --- what is left, and what is gone ---


@given(rounds(), st.data())
def test_when_nothing_was_substituted_what_arrived_weighs_as_if_the_rest_had_been_dropped(
    round_: tuple[Routing, State], data: st.DataObject
) -> None:
    routing, state = round_
    selection = finish(routing, device_of_pair(routing, state))
    sent_TK = selection.device_TK != DROPPED
    arrived_TK = sent_TK & data.draw(hnp.arrays(bool, sent_TK.shape))
    found_TK, expected_TK = arrived_weights(selection, arrived_TK), surviving_weights(routing, arrived_TK)
    assert found_TK.dtype == expected_TK.dtype
    left_T1 = (found_TK > 0).any(axis=1, keepdims=True)  # a token whose survivors weigh nothing has nothing to keep
    np.testing.assert_allclose(found_TK, np.where(left_T1, expected_TK, 0), rtol=1e-5)
    assert (found_TK[~arrived_TK] == 0).all()


@given(rounds())
def test_what_all_arrived_passes_bit_for_bit(round_: tuple[Routing, State]) -> None:
    selection = finish(round_[0], device_of_pair(*round_))
    np.testing.assert_array_equal(
        arrived_weights(selection, selection.device_TK != DROPPED),
        np.where(selection.device_TK != DROPPED, selection.weight_TK, 0),
    )


@given(rounds())
def test_the_dropped_share_is_the_gates_weight_that_is_not_sent(round_: tuple[Routing, State]) -> None:
    routing = round_[0]
    selection = finish(routing, device_of_pair(*round_))
    routed_TK, sent_TK = routed(routing), selection.device_TK != DROPPED
    total = routing.weight_TK[routed_TK].sum(dtype=float)
    expected = routing.weight_TK[routed_TK & ~sent_TK].sum(dtype=float) / total if total else 0.0
    assert dropped_share(routing, selection) == pytest.approx(expected, rel=1e-5)
    assert 0 <= dropped_share(routing, selection) <= 1 + 1e-6


def test_a_replaced_pair_counts_as_dropped_once() -> None:
    routing, _ = identity_round([[0.5, 0.25, 0.25]], [1.0, 1.0, 1.0])
    replaced = Selection(np.array([[0, 0, DROPPED]]), routing.weight_TK, expert_TK=np.array([[0, 0, 1]]))
    assert dropped_share(routing, replaced) == pytest.approx(0.5)
    assert dropped_share(routing, Selection(routing.expert_TK, routing.weight_TK, expert_TK=routing.expert_TK)) == 0


def test_a_token_without_any_expert_takes_no_part_in_the_share() -> None:
    routing = Routing(0, np.array([[2, 2], [0, 1]]), np.array([[9.0, 9.0], [0.75, 0.25]]), np.eye(2, dtype=bool))
    selection = Selection(np.array([[DROPPED, DROPPED], [0, DROPPED]]), routing.weight_TK)
    assert dropped_share(routing, selection) == 0.25
    assert (
        dropped_share(
            Routing(0, routing.expert_TK[:0], routing.weight_TK[:0], routing.holds_NE),
            Selection(np.empty((0, 2), int), np.empty((0, 2))),
        )
        == 0
    )
