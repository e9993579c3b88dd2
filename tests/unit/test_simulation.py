"""Every policy over every draw: compiled loops, policies asked one by one, and the formulas, must say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_node.band import RECENT_BLOCKS
from testbed.errors import ConfigError
from testbed.latency.model import ComputeModel, block_s, eq8_prompt_s, rate_bits_per_s
from testbed.policies.bandwidth import block_shares, device_times_s
from testbed.policies.base import DROPPED, Deadline, Policy, Routing, Selection, State
from testbed.policies.drop_late import DropLate
from testbed.policies.load_aware import LoadAware
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR
from testbed.simulation.allocation import Allocation, recent_blocks
from testbed.simulation.draws import Draws, cost_draws
from testbed.simulation.kernels import EQ8_S, KEPT, MASS, ORPHANED, SENT
from testbed.simulation.montecarlo import (
    DRAWS_AT_ONCE,
    Simulated,
    asked_one_by_one,
    block_times,
    deadline_s,
    is_quick,
    simulate_policy,
    times_of,
)
from testbed.simulation.routing import RoutedBlock, pack

BAND_HZ = 20e6
ROW_BITS_W = np.array([8 * 4100.0, 8 * 2050.0])
PERIODS = ("block", "prompt", "static")


def channel_of(
    seed: int, draws: int, devices: int, *, roofline: bool = False, shared: bool = False, band_hz: float = BAND_HZ
) -> Draws:
    """Random links and devices of different speed."""
    rng = np.random.default_rng(seed)
    snr_hz_DWN = rng.uniform(0.1, 30, (draws, 2, devices)) * band_hz / devices
    rates_DWN = np.asarray(rate_bits_per_s(band_hz / devices, snr_hz_DWN, 1.0, 1.0))
    compute_N = [ComputeModel(1e-4 * roofline, 3e-4 * roofline, rng.uniform(1e-5, 8e-4)) for _ in range(devices)]
    return cost_draws(
        rates_DWN, snr_hz_DWN, compute_N, rng.uniform(1, 3, (draws, devices)), row_bits_W=ROW_BITS_W,
        delay_s=1e-4 * roofline, bandwidth_hz=np.nan if shared else band_hz, shared=shared,
    )  # fmt: skip


def blocks_of(
    seed: int, *, devices: int = 4, experts: int = 6, prompts: int = 2, tokens: int = 9, holes: bool = False
) -> list[RoutedBlock]:
    """Two layers a prompt, two experts a token, some experts on several devices. holes: experts that nobody holds, and
    tokens without one."""
    rng = np.random.default_rng(seed)
    holds_NE = rng.random((devices, experts)) < 0.4
    if not holes:
        holds_NE[rng.integers(devices, size=experts), np.arange(experts)] = True
    return [
        RoutedBlock(prompt, routing_of(rng, layer, holds_NE, tokens, holes))
        for prompt in range(prompts)
        for layer in range(2)
    ]


def routing_of(
    rng: np.random.Generator, layer: int, holds_NE: np.ndarray[Any, Any], tokens: int, holes: bool
) -> Routing:
    experts = holds_NE.shape[1]
    score_TE = rng.dirichlet(np.ones(experts), tokens).astype(np.float32)
    expert_TK = np.argsort(-score_TE, axis=1)[:, :2]
    weight_TK = np.take_along_axis(score_TE, expert_TK, axis=1)
    if holes:
        expert_TK[rng.random(expert_TK.shape) < 0.2] = experts
        expert_TK[rng.random(tokens) < 0.2] = experts
    return Routing(layer, expert_TK, weight_TK, holds_NE, score_TE)


def assert_same(one: Simulated, other: Simulated) -> None:
    np.testing.assert_allclose(one.block_s_DB, other.block_s_DB, rtol=1e-9)
    np.testing.assert_allclose(one.sums_DS, other.sums_DS, rtol=1e-9, atol=1e-12)


policies = st.one_of(st.just(TopK()), st.floats(0, 0.5).map(WLR))
allocations = st.sampled_from(
    [Allocation(), *(Allocation(band, period) for band in ("proportional", "optimal") for period in PERIODS)]
)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), policy=policies, allocation=allocations, roofline=st.booleans(), holes=st.booleans())
def test_compiled_loops_and_policies_asked_one_by_one_agree(
    seed: int, policy: Policy, allocation: Allocation, roofline: bool, holes: bool
) -> None:
    blocks, channel = blocks_of(seed, holes=holes), channel_of(seed, 3, 4, roofline=roofline)
    compiled = simulate_policy(policy, allocation, blocks, pack(blocks), channel)

    class Disguised:
        name, params, select = "disguised", policy.params, policy.select

    assert_same(compiled, simulate_policy(Disguised(), allocation, blocks, pack(blocks), channel))


def test_many_draws_are_those_of_each_by_itself_in_their_order() -> None:
    blocks, channel = blocks_of(5), channel_of(5, DRAWS_AT_ONCE + 3, 4)
    counted: list[int] = []
    together = simulate_policy(WLR(0.3), Allocation("optimal"), blocks, pack(blocks), channel, counted.append)
    assert sum(counted) == len(channel) == len(together.block_s_DB)
    for draw in (0, 1, DRAWS_AT_ONCE, DRAWS_AT_ONCE + 2):
        alone = simulate_policy(WLR(0.3), Allocation("optimal"), blocks, pack(blocks), channel.part(draw, draw + 1))
        np.testing.assert_array_equal(alone.block_s_DB[0], together.block_s_DB[draw])
        np.testing.assert_array_equal(alone.sums_DS[0], together.sums_DS[draw])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), theta=st.floats(0, 0.5))
def test_both_latencies_and_all_sums_are_those_of_the_formulas(seed: int, theta: float) -> None:
    blocks, channel = blocks_of(seed), channel_of(seed, 1, 4)
    simulated = simulate_policy(WLR(theta), Allocation(), blocks, pack(blocks), channel)
    state = channel.state(0)
    chosen = [WLR(theta).select(block.routing, state).device_TK for block in blocks]
    weights = [block.routing.weight_TK for block in blocks]
    expected_s = [block_s(state.token_s_N, device_TK) for device_TK in chosen]
    np.testing.assert_allclose(simulated.block_s_DB[0], expected_s)
    sums_S = simulated.sums_DS[0]
    assert sums_S[EQ8_S] == pytest.approx(sum(eq8_prompt_s(state.token_s_N, device_TK) for device_TK in chosen))
    assert sums_S[KEPT] == sums_S[SENT] == sum((device_TK != DROPPED).sum() for device_TK in chosen)
    dropped = sum(w[d == DROPPED].sum(dtype=float) for w, d in zip(weights, chosen, strict=True))
    assert sums_S[MASS] == pytest.approx(dropped)
    assert sums_S[ORPHANED] == 0


def test_a_token_whose_experts_nobody_holds_is_orphaned_and_one_without_experts_is_not() -> None:
    routing = Routing(0, np.array([[0, 1], [1, 1], [2, 2]]), np.full((3, 2), 0.5), np.array([[True, False]]))
    blocks, channel = [RoutedBlock(0, routing)], channel_of(0, 1, 1)
    sums_S = simulate_policy(TopK(), Allocation(), blocks, pack(blocks), channel).sums_DS[0]
    assert (sums_S[KEPT], sums_S[ORPHANED], sums_S[MASS]) == (1, 1, 1.5)
    assert pack(blocks).pairs == 4
    assert pack(blocks).mass == 2.0


# --- Bandwidth ---


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), roofline=st.booleans())
def test_the_best_split_of_a_block_is_the_base_stations(seed: int, roofline: bool) -> None:
    rng, channel = np.random.default_rng(seed), channel_of(seed, 1, 5, roofline=roofline)
    rows_N = rng.integers(0, 20, 5)
    experts_N = np.minimum(rows_N, rng.integers(1, 3, 5))
    share_DBN = Allocation("optimal").shares(rows_N[None, None], experts_N[None, None], channel, np.zeros(1, np.int64))
    assert share_DBN is not None
    expected_N, seconds = block_shares(rows_N, experts_N, channel.state(0))
    np.testing.assert_allclose(share_DBN[0, 0], expected_N, atol=1e-7)
    if not roofline:  # there the base station's costs add up what truly overlaps
        device_s_N = times_of(rows_N[None, None], experts_N[None, None], channel, share_DBN)[0, 0]
        assert device_s_N.max() == pytest.approx(seconds, abs=1e-12)
        expected_s_N = device_times_s(rows_N, experts_N, channel.state(0), share_DBN[0, 0])
        np.testing.assert_allclose(device_s_N, expected_s_N, rtol=1e-9)


@pytest.mark.parametrize("period", PERIODS)
def test_sharing_the_band_out_changes_times_and_nothing_else(period: str) -> None:
    blocks, channel = blocks_of(1, prompts=3), channel_of(1, 20, 4)
    even = simulate_policy(TopK(), Allocation(), blocks, pack(blocks), channel)
    shared_out = simulate_policy(TopK(), Allocation("optimal", period), blocks, pack(blocks), channel)
    np.testing.assert_array_equal(even.sums_DS, shared_out.sums_DS)
    assert not np.allclose(even.block_s_DB, shared_out.block_s_DB)
    if period == "block":
        assert (shared_out.block_s_DB <= even.block_s_DB * (1 + 1e-9)).all()


def test_a_static_split_is_one_for_all_draws_and_a_prompts_split_one_for_its_blocks() -> None:
    blocks, channel = blocks_of(2, prompts=2), channel_of(2, 3, 4)
    rows_DBN = np.random.default_rng(0).integers(0, 9, (3, 4, 4))
    experts_DBN = (rows_DBN > 0).astype(np.int64)
    prompt_B = pack(blocks).prompt_B
    share_DBN = Allocation("optimal", "prompt").shares(rows_DBN, experts_DBN, channel, prompt_B)
    assert share_DBN is not None
    np.testing.assert_array_equal(share_DBN[:, 0], share_DBN[:, 1])
    assert not np.allclose(share_DBN[:, 1], share_DBN[:, 2])
    assert not np.allclose(share_DBN[0], share_DBN[1])
    split_N = np.array([0.4, 0.3, 0.2, 0.1])
    static = Allocation("optimal", "static", split_N).shares(rows_DBN, experts_DBN, channel, prompt_B)
    assert static is not None
    assert (static == split_N).all()


def test_recent_blocks_are_those_before_the_prompts_own_and_no_more_than_a_base_station_remembers() -> None:
    assert recent_blocks(np.array([4, 5]), 8).tolist() == [3, 2, 1, 0, 7, 6]
    assert recent_blocks(np.array([0, 1]), 2).tolist() == [1, 0]
    assert recent_blocks(np.arange(40, 44), 100).tolist() == list(range(39, 39 - RECENT_BLOCKS, -1))


class Sharing:
    """topk with a split of its own."""

    name = "sharing"
    params: Mapping[str, Any] = {}

    def select(self, routing: Routing, state: State) -> Selection:
        chosen = TopK().select(routing, state)
        rows_N = np.bincount(chosen.device_TK.ravel(), minlength=len(state.token_s_N))
        share_N, _ = block_shares(rows_N, rows_N, state)
        return Selection(chosen.device_TK, chosen.weight_TK, bandwidth_share_N=share_N)


def test_a_policys_own_split_is_what_its_blocks_get() -> None:
    blocks, channel = blocks_of(3), channel_of(3, 4, 4)
    own = simulate_policy(Sharing(), Allocation(), blocks, pack(blocks), channel)
    assert_same(own, simulate_policy(TopK(), Allocation("optimal"), blocks, pack(blocks), channel))


@pytest.mark.parametrize(("policy", "allocation"), [(TopK(), Allocation("optimal")), (Sharing(), Allocation())])
def test_a_band_that_does_not_exist_cannot_be_shared_out(policy: Policy, allocation: Allocation) -> None:
    blocks, channel = blocks_of(0), channel_of(0, 1, 4, shared=True)
    with pytest.raises(ConfigError, match="no band"):
        simulate_policy(policy, allocation, blocks, pack(blocks), channel)


# --- One air, deadlines, other experts ---


def test_on_one_shared_air_blocks_take_no_less_than_their_links_alone_and_no_less_than_all_transmissions() -> None:
    rows_DBN = np.random.default_rng(0).integers(0, 30, (5, 3, 4))
    experts_DBN = (rows_DBN > 0).astype(np.int64)
    channel = channel_of(0, 5, 4, shared=True)
    device_s_DBN = times_of(rows_DBN, experts_DBN, channel, None)
    block_s_DB = block_times(rows_DBN, device_s_DBN, channel)
    air_s_DB = np.einsum("dbn,dwn->db", rows_DBN, channel.air_row_s_DWN)
    assert (block_s_DB >= device_s_DBN.max(axis=2) - 1e-12).all()
    assert (block_s_DB >= air_s_DB - 1e-12).all()
    alone_DBN = rows_DBN * (np.arange(4) == 2)
    alone_s_DBN = times_of(alone_DBN, experts_DBN, channel, None)
    np.testing.assert_allclose(block_times(alone_DBN, alone_s_DBN, channel), alone_s_DBN.max(axis=2))


def test_a_round_with_a_deadline_ends_by_it_and_who_is_late_counts_as_dropped() -> None:
    blocks, channel = blocks_of(4, tokens=40), channel_of(4, 3, 4)
    topk = simulate_policy(TopK(), Allocation(), blocks, pack(blocks), channel)
    soon = simulate_policy(DropLate(1, 0.0), Allocation(), blocks, pack(blocks), channel)
    never = simulate_policy(DropLate(2, 1e5), Allocation(), blocks, pack(blocks), channel)
    assert_same(never, topk)
    assert (soon.block_s_DB <= topk.block_s_DB).all()
    assert (soon.sums_DS[:, SENT] == topk.sums_DS[:, SENT]).all()
    late_D = soon.sums_DS[:, SENT] - soon.sums_DS[:, KEPT]
    assert late_D.max() > 0
    np.testing.assert_array_equal(late_D > 0, soon.sums_DS[:, MASS] > 0)
    assert (soon.sums_DS[:, ORPHANED] == 0).all(), "every token has an answer before the deadline begins"


def test_the_deadline_begins_when_every_token_has_k_min_answers_or_all_it_was_sent_for() -> None:
    device_TK = np.array([[0, 1], [1, 2], [DROPPED, 0], [DROPPED, DROPPED]])
    device_s_N = np.array([1.0, 2.0, 5.0])
    assert deadline_s(Deadline(1, 0.5), device_TK, device_s_N) == 2.5
    assert deadline_s(Deadline(2, 0.5), device_TK, device_s_N) == 5.5
    assert deadline_s(Deadline(1, 0.5), device_TK[3:], device_s_N) == 0.5


class AllToExpertZero:
    """Everything on device 0, by the expert 0."""

    name = "one"
    params: Mapping[str, Any] = {}

    def select(self, routing: Routing, _: State) -> Selection:
        zero_TK = np.zeros_like(routing.expert_TK)
        return Selection(zero_TK, routing.weight_TK, expert_TK=zero_TK)


def test_the_experts_that_count_are_those_that_compute() -> None:
    blocks, channel = blocks_of(6, tokens=10), channel_of(6, 1, 4, roofline=True)
    found = asked_one_by_one(AllToExpertZero(), Allocation(), blocks, pack(blocks), channel)
    expected_s = times_of(np.array([[[20, 0, 0, 0]]]), np.array([[[1, 0, 0, 0]]]), channel, None).max()
    np.testing.assert_allclose(found.block_s_DB, expected_s)


def test_an_answer_of_another_shape_is_the_policys_mistake() -> None:
    class Wrong(AllToExpertZero):
        def select(self, *_: object) -> Selection:
            return Selection(np.zeros((1, 1), int), np.zeros((1, 1)))

    blocks = blocks_of(0)
    with pytest.raises(ConfigError, match="policy one: answers must have the shape"):
        simulate_policy(Wrong(), Allocation(), blocks, pack(blocks), channel_of(0, 1, 4))


def test_quick_is_what_is_compiled() -> None:
    assert is_quick(TopK(), Allocation())
    assert is_quick(WLR(0.1), Allocation("optimal", "static"))
    assert not is_quick(WLR(0.1), Allocation("optimal", "prompt"))
    assert not is_quick(LoadAware(), Allocation())


def test_nothing_to_simulate_is_said() -> None:
    with pytest.raises(ConfigError, match="score_prompts"):
        pack([])
