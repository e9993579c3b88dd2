"""Eq. 2-8 against slow loops and figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.latency.model import (
    ComputeModel,
    amplitude_gain,
    block_s,
    eq8_prompt_s,
    expert_flop_per_row,
    noise_w_per_hz,
    path_loss_db,
    rate_bits_per_s,
    row_bits,
    token_s,
)
from testbed.policies.base import DROPPED, FloatArray, IntArray
from testbed.wire.quantization import SCHEMES

Sent = tuple[FloatArray, IntArray]
Latency = Callable[[FloatArray, IntArray], float]
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def sent(draw: st.DrawFn) -> Sent:
    """Devices' times and which device each pair went to, some pairs dropped."""
    devices, tokens, kept = draw(st.integers(1, 6)), draw(st.integers(0, 6)), draw(st.integers(1, 4))
    time_s_N = draw(st.lists(POSITIVE, min_size=devices, max_size=devices))
    pairs = st.lists(st.integers(DROPPED, devices - 1), min_size=tokens * kept, max_size=tokens * kept)
    return np.array(time_s_N), np.array(draw(pairs), dtype=np.int64).reshape(tokens, kept)


def test_a_mixtral_expert_takes_about_352_megaflop_per_token() -> None:
    assert expert_flop_per_row(4096, 14336) == 352_393_216


def test_without_a_gate_there_is_one_projection_up_and_no_product() -> None:
    assert expert_flop_per_row(10, 100, gated=False) == 2 * 10 * 100 + 2 * 100 * 10 + 4 * 100


def test_path_loss_is_free_space_and_grows_by_20_db_per_decade() -> None:
    assert path_loss_db(1, 1) == pytest.approx(32.4)
    assert path_loss_db(100, 3.5) == pytest.approx(32.4 + 10.881 + 40, abs=1e-3)
    assert np.diff(path_loss_db([10, 100, 1000], 3.5)) == pytest.approx([20, 20])


@pytest.mark.parametrize(("distance_m", "carrier_ghz"), [(0, 3.5), ([5, -1], 3.5), (math.nan, 3.5), (5, 0)])
def test_a_distance_or_carrier_that_is_not_above_0_is_refused(distance_m: float, carrier_ghz: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        path_loss_db(distance_m, carrier_ghz)


def test_twenty_db_are_a_tenth_of_the_amplitude() -> None:
    assert amplitude_gain([0, 20, 40]) == pytest.approx([1, 0.1, 0.01])


def test_noise_is_minus_174_dbm_per_hz_plus_the_figure() -> None:
    assert noise_w_per_hz(0) == pytest.approx(3.981e-21, rel=1e-3)
    assert noise_w_per_hz(10) / noise_w_per_hz(0) == pytest.approx(10)


@given(st.lists(st.tuples(POSITIVE, POSITIVE, st.floats(0, 1)), min_size=1, max_size=5), st.floats(1e-6, 1))
def test_a_rate_is_shannons_for_every_link(links: list[tuple[float, float, float]], noise: float) -> None:
    band, power, gain = np.array(links).T
    slow = [b * math.log2(1 + p * g * g / (noise * b)) for b, p, g in links]
    assert rate_bits_per_s(band, power, gain, noise) == pytest.approx(slow, rel=1e-6, abs=1e-6)


def test_one_bit_per_hertz_is_carried_where_signal_equals_noise() -> None:
    assert rate_bits_per_s(100.0, 1.0, 1.0, 0.01) == pytest.approx(100)


def test_no_bandwidth_carries_nothing_and_warns_of_nothing() -> None:
    assert rate_bits_per_s([0.0, 100.0], 1.0, 1.0, 0.01).tolist() == pytest.approx([0, 100])
    assert rate_bits_per_s(0.0, 1.0, 0.0, 0.01) == 0


def test_more_bandwidth_always_carries_more_but_by_less_and_less() -> None:
    rate = rate_bits_per_s(np.linspace(1e6, 1e8, 50), 10, 1e-6, noise_w_per_hz(7))
    assert (np.diff(rate) > 0).all()
    assert (np.diff(rate, 2) < 0).all()


def test_a_row_takes_epsilon_bits_per_value_and_what_the_wire_adds() -> None:
    assert row_bits(4096, 8) == 32_768
    added_bytes = SCHEMES["int8"].row_bytes(4096) - 4096
    assert row_bits(4096, 8, added_bytes) == 8 * SCHEMES["int8"].row_bytes(4096)


@given(POSITIVE, POSITIVE, st.lists(st.tuples(POSITIVE, POSITIVE, POSITIVE), min_size=1, max_size=5))
def test_eq_6_adds_downlink_compute_and_uplink(
    down_bits: float, up_bits: float, devices: list[tuple[float, float, float]]
) -> None:
    slow = [down_bits / down + compute + up_bits / up for down, up, compute in devices]
    assert token_s(down_bits, up_bits, *np.array(devices).T) == pytest.approx(slow)


@given(sent())
def test_eq_8_is_the_sum_over_tokens_of_their_slowest_kept_device(sent: Sent) -> None:
    time_s_N, device_TK = sent
    slow = sum(max((time_s_N[d] for d in devices if d != DROPPED), default=0.0) for devices in device_TK.tolist())
    assert eq8_prompt_s(time_s_N, device_TK) == pytest.approx(slow)


@given(sent())
def test_a_block_waits_for_the_device_whose_rows_take_longest(sent: Sent) -> None:
    time_s_N, device_TK = sent
    pairs = device_TK.ravel().tolist()
    slow = max((pairs.count(d) * t for d, t in enumerate(time_s_N)), default=0.0)
    assert block_s(time_s_N, device_TK) == pytest.approx(slow)


@given(sent())
def test_dropping_pairs_never_makes_either_latency_longer(sent: Sent) -> None:
    time_s_N, device_TK = sent
    fewer_TK = device_TK.copy()
    fewer_TK[:, 0] = DROPPED
    assert eq8_prompt_s(time_s_N, fewer_TK) <= eq8_prompt_s(time_s_N, device_TK) * (1 + 1e-12)
    assert block_s(time_s_N, fewer_TK) <= block_s(time_s_N, device_TK)


@pytest.mark.parametrize("latency", [eq8_prompt_s, block_s])
def test_an_unknown_time_matters_only_where_it_is_needed(latency: Latency) -> None:
    time_s_N = np.array([1.0, math.nan, math.inf])
    assert latency(time_s_N, np.array([[0, DROPPED], [0, 0]])) == {eq8_prompt_s: 2.0, block_s: 3.0}[latency]
    assert math.isnan(latency(time_s_N, np.array([[0, 1]])))


@pytest.mark.parametrize("latency", [eq8_prompt_s, block_s])
@pytest.mark.parametrize("device", [-2, 2])
def test_a_device_that_is_not_there_is_refused(latency: Latency, device: int) -> None:
    with pytest.raises(ValueError, match=r"within -1 \(dropped\) and 1"):
        latency(np.ones(2), np.array([[0, device]]))


@given(st.tuples(POSITIVE, POSITIVE, POSITIVE), st.lists(st.integers(0, 9), min_size=1), st.integers(1, 8))
def test_compute_is_the_base_and_the_slower_of_rows_and_experts(
    parts: tuple[float, float, float], rows: list[int], experts: int
) -> None:
    model = ComputeModel(*parts)
    base_s, expert_s, row_s = parts
    slow = [base_s + max(r * row_s, experts * expert_s) if r else 0.0 for r in rows]
    assert model.seconds(np.array(rows), np.full(len(rows), experts)) == pytest.approx(slow)
    assert model.seconds(rows[0], experts) == pytest.approx(slow[0])


def test_the_papers_compute_is_flop_over_flops_whatever_the_experts() -> None:
    model = ComputeModel.paper(352e6, 4e12)
    assert model.seconds(10, 1) == model.seconds(10, 8) == pytest.approx(880e-6)


def test_a_roofline_is_bound_by_memory_for_one_row_and_by_arithmetic_for_many() -> None:
    model = ComputeModel.roofline(352e6, 4e12, 352e6, 205e9, base_s=1e-4)
    assert model.seconds(1, 1) == model.seconds(2, 1) == pytest.approx(1e-4 + 352e6 / 205e9)
    assert model.seconds(1000, 2) == pytest.approx(1e-4 + 0.088)
    assert model.seconds(0, 0) == 0
