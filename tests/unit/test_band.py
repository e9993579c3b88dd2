"""Who gets how much of the band in a round, and what the links are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_node.band import IDLE_SHARE, RECENT_BLOCKS, Band, BandPlan, loads, with_idle
from bs_node.blocks import Block, group
from testbed.errors import ConfigError
from testbed.latency.csi import EstimatedCsi, ShapedCsi
from testbed.policies.bandwidth import block_shares, period_shares, rates_bits_per_s
from testbed.policies.base import Air, FloatArray, IntArray, State

DEVICES, BAND_HZ = 4, 100e6
EVEN_N = np.full(DEVICES, 1 / DEVICES)
SNR_HZ_WN = np.array([[1e9, 3e8, 1e8, 3e7], [1e8, 3e7, 1e7, 3e6]])
ROW_S_WN = 33_000 / (BAND_HZ / DEVICES * np.log2(1 + SNR_HZ_WN / (BAND_HZ / DEVICES)))
ROWS = st.lists(st.integers(0, 60), min_size=DEVICES, max_size=DEVICES)
SHARES = hnp.arrays(float, DEVICES, elements=st.just(0.0) | st.floats(1e-3, 1)).filter(lambda share_N: share_N.any())


def state_of(row_s_WN: FloatArray = ROW_S_WN, snr_hz_WN: FloatArray = SNR_HZ_WN) -> State:
    zero_N, row_s_N = np.zeros(DEVICES), row_s_WN.sum(axis=0) + 1e-4
    air = Air(BAND_HZ, snr_hz_WN, row_s_WN)
    return State(row_s_N, np.ones(DEVICES, bool), zero_N, zero_N, zero_N, row_s_N, air)


def blocks_of(*rows_N: int) -> list[Block]:
    """Device n gets that many rows, all of them for its own expert."""
    device_TK = np.repeat(np.arange(DEVICES), rows_N)[:, None]
    return group(device_TK, device_TK, DEVICES, DEVICES)


def one_each(rows_N: IntArray | tuple[int, ...]) -> IntArray:
    return (np.asarray(rows_N) > 0).astype(np.int64)


class Links:
    """Stand for the links: remember what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[FloatArray] = []

    def __call__(self, share_N: FloatArray) -> None:
        self.asked.append(share_N.copy())


def band_of(links: Links | None = None) -> Band:
    return Band(EstimatedCsi(BAND_HZ, DEVICES, 33_000, 33_000), DEVICES, links or Links())


# --- the plan ---


@given(ROWS)
def test_a_load_is_its_blocks_rows_and_different_experts(rows_N: list[int]) -> None:
    found_rows_N, found_experts_N = loads(blocks_of(*rows_N), DEVICES)
    assert found_rows_N.tolist() == rows_N
    assert found_experts_N.tolist() == one_each(np.array(rows_N)).tolist()


def test_an_expert_counts_once_however_many_rows_it_has() -> None:
    expert_TK = np.array([[0, 1], [0, 2], [3, 0]])
    rows_N, experts_N = loads(group(expert_TK, np.array([[0, 0], [0, 0], [2, 0]]), DEVICES, 4), DEVICES)
    assert (rows_N.tolist(), experts_N.tolist()) == ([5, 0, 1, 0], [3, 0, 1, 0])


@pytest.mark.parametrize("period", ["block", "prompt", "static"])
def test_an_even_split_is_asked_for_by_name_and_needs_no_band(period: Any) -> None:
    plan = BandPlan("even", period)
    for prompt in range(3):
        assert plan.share_N(blocks_of(9, 1, 1, 1), replace(state_of(), air=None), prompt) is None


@pytest.mark.parametrize("period", ["block", "prompt"])
def test_without_a_band_an_optimal_split_is_refused(period: Any) -> None:
    plan, blocks = BandPlan("optimal", period), blocks_of(9, 1, 1, 1)
    if period == "prompt":
        assert plan.share_N(blocks, state_of(), 0) is None
    with pytest.raises(ConfigError, match="no band to split"):
        plan.share_N(blocks, replace(state_of(), air=None), 1)


@given(ROWS)
def test_per_block_the_split_is_the_best_for_that_block(rows_N: list[int]) -> None:
    share_N = BandPlan("optimal").share_N(blocks_of(*rows_N), state_of(), 0)
    assert share_N is not None
    best_N, _ = block_shares(np.array(rows_N), one_each(np.array(rows_N)), state_of())
    np.testing.assert_array_equal(share_N, best_N)


@given(ROWS.filter(any))
def test_a_proportional_split_goes_by_the_rows(rows_N: list[int]) -> None:
    share_N = BandPlan("proportional").share_N(blocks_of(*rows_N), state_of(), 0)
    assert share_N == pytest.approx(np.array(rows_N) / sum(rows_N))


def shares_of(plan: BandPlan, prompts: list[list[tuple[int, ...]]]) -> list[list[FloatArray | None]]:
    """What a plan answers in every block of these prompts, given as the devices' rows."""
    return [
        [plan.share_N(blocks_of(*rows_N), state_of(), prompt) for rows_N in blocks]
        for prompt, blocks in enumerate(prompts)
    ]


@pytest.mark.parametrize("split", ["optimal", "proportional"])
def test_per_prompt_the_split_is_made_as_it_begins_from_the_blocks_before(split: Any) -> None:
    first, second = [(40, 10, 5, 1), (1, 1, 1, 1)], [(0, 0, 0, 8), (2, 2, 2, 2)]
    found = shares_of(BandPlan(split, "prompt"), [first, second, first])
    assert found[0] == [None, None]  # nothing to go by: even
    for prompt, before in ((1, first), (2, first + second)):
        rows_BN = np.array(before)
        expected_N = (
            rows_BN.sum(axis=0) / rows_BN.sum()
            if split == "proportional"
            else period_shares(rows_BN, one_each(rows_BN), state_of())
        )
        one, other = found[prompt]
        assert one is other, "one split for the whole prompt"
        assert one == pytest.approx(expected_N)


def test_a_prompt_goes_by_the_latest_blocks_only() -> None:
    old, new = [(50, 0, 0, 0)] * 9, [(0, 0, 0, 50)] * RECENT_BLOCKS
    found = shares_of(BandPlan("proportional", "prompt"), [old + new, new])
    assert found[1][0] == pytest.approx([0, 0, 0, 1])


def test_a_static_split_is_made_once_when_enough_blocks_have_been_seen() -> None:
    few, more = [(9, 3, 2, 1)] * (RECENT_BLOCKS - 1), [(1, 2, 3, 9)] * 5
    found = shares_of(BandPlan("optimal", "static"), [few, more, more, [(0, 0, 0, 9)] * RECENT_BLOCKS, more])
    assert all(share_N is None for share_N in found[0] + found[1]), "as the second began one block was missing"
    kept_N = found[2][0]
    assert kept_N is not None
    assert all(share_N is kept_N for prompt in found[2:] for share_N in prompt)
    seen_BN = np.array((few + more)[-RECENT_BLOCKS:])
    assert kept_N == pytest.approx(period_shares(seen_BN, one_each(seen_BN), state_of()))


# --- the band ---


@given(SHARES)
def test_devices_without_a_share_keep_a_little_and_the_whole_stays_the_whole(weight_N: FloatArray) -> None:
    share_N = weight_N / weight_N.sum()
    kept_N = with_idle(share_N)
    assert kept_N.sum() == pytest.approx(1)
    assert (kept_N >= 1e-4 / DEVICES).all()
    idle_N = share_N == 0
    assert kept_N[idle_N] == pytest.approx(IDLE_SHARE / DEVICES)
    assert (kept_N[~idle_N] >= share_N[~idle_N] * (1 - IDLE_SHARE)).all()
    assert (kept_N[~idle_N] <= share_N[~idle_N]).all()


def test_links_are_told_only_of_a_change() -> None:
    links, share_N = Links(), np.array([0.4, 0.3, 0.2, 0.1])
    band = band_of(links)
    for wanted_N in (None, None, share_N, share_N.copy(), None, share_N):
        band.give(wanted_N)
    even, own = EVEN_N.tolist(), share_N.tolist()
    assert [asked_N.tolist() for asked_N in links.asked] == [even, own, even, own], "the first time even if it is even"
    assert band.share_N.tolist() == share_N.tolist()


def test_no_link_is_ever_told_to_carry_nothing() -> None:
    links = Links()
    band_of(links).give(np.array([1.0, 0.0, 0.0, 0.0]))
    (asked_N,) = links.asked
    assert (asked_N > 0).all()


def test_what_was_refused_is_not_in_force() -> None:
    def enforce(_share_N: FloatArray) -> None:
        raise ConfigError("no")

    band = Band(EstimatedCsi(BAND_HZ, DEVICES, 33_000, 33_000), DEVICES, enforce)
    with pytest.raises(ConfigError):
        band.give(np.array([0.4, 0.3, 0.2, 0.1]))
    assert band.share_N.tolist() == EVEN_N.tolist()


@given(SHARES)
def test_a_rate_under_shares_over_that_at_the_even_split_is_the_ratio(weight_N: FloatArray) -> None:
    band, air = band_of(), Air(BAND_HZ, SNR_HZ_WN, ROW_S_WN)
    band.give(weight_N / weight_N.sum())
    even_WN, now_WN = (rates_bits_per_s(air, share_N) for share_N in (EVEN_N, band.share_N))
    np.testing.assert_allclose(band.air_ratio_WN(air), now_WN / even_WN, rtol=1e-12)


def test_a_link_of_which_nothing_is_known_is_taken_as_it_is() -> None:
    band = band_of()
    band.give(np.array([0.7, 0.1, 0.1, 0.1]))
    snr_hz_WN = np.where([[True, False, True, True]], SNR_HZ_WN, np.nan)
    ratio_WN = band.air_ratio_WN(Air(BAND_HZ, snr_hz_WN, ROW_S_WN))
    assert ratio_WN[:, 1].tolist() == [1.0, 1.0]
    assert (ratio_WN[:, 0] > 1).all()
    assert (ratio_WN[:, 2:] < 1).all()


@given(SHARES)
def test_what_is_asked_for_is_the_whole_band_and_the_rates_that_it_carries(weight_N: FloatArray) -> None:
    band, air = band_of(), Air(BAND_HZ, SNR_HZ_WN, ROW_S_WN)
    band.give(weight_N / weight_N.sum())
    hz_N, down_N, up_N = band.asked(air)
    assert hz_N.sum() == pytest.approx(BAND_HZ)
    np.testing.assert_allclose([down_N, up_N], hz_N * np.log2(1 + SNR_HZ_WN / hz_N))


def test_where_rates_are_shaped_no_spectrum_is_asked_for() -> None:
    band = Band(ShapedCsi(8e6), DEVICES, Links())
    band.give(np.array([0.4, 0.3, 0.2, 0.1]))
    hz_N, down_N, up_N = band.asked(band.air(np.full((2, DEVICES), np.nan)))
    assert np.isnan(hz_N).all()
    assert down_N.tolist() == up_N.tolist() == pytest.approx([3.2e6, 2.4e6, 1.6e6, 0.8e6])
