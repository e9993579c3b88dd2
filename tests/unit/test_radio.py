"""The true channel: what its draws look like in the long run, and that they are the same for whoever asks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from testbed.channel.radio import Gains, RadioChannel, placements, rician_mean_amplitude
from testbed.config import load_run_file
from testbed.config.radio import BlockageSection, PlacementSection, RadioSection
from testbed.errors import ConfigError
from testbed.latency.model import amplitude_gain, noise_w_per_hz, path_loss_db, rate_bits_per_s
from testbed.policies.base import FloatArray

DISTANCE_M_N = np.array([50.0, 120.0, 300.0, 500.0])
PROMPTS = 4000
BLOCKAGE = BlockageSection(loss_db=20, p_block=0.1, p_clear=0.3)


def channel(distance_m_N: FloatArray = DISTANCE_M_N, seed: int = 1, **keys: Any) -> RadioChannel:
    return RadioChannel(RadioSection(**keys), distance_m_N, seed)


def amplitudes(radio: RadioChannel, distance_m_N: FloatArray = DISTANCE_M_N) -> tuple[FloatArray, FloatArray]:
    """Down and up gains of many prompts (P, N), with the path loss taken out."""
    path_gain_N = amplitude_gain(path_loss_db(distance_m_N, 3.5))
    drawn = [radio.gains(prompt) for prompt in range(PROMPTS)]
    return tuple(np.array(gain_PN) / path_gain_N for gain_PN in zip(*drawn, strict=True))


def same(one: Gains, other: Gains) -> bool:
    return bool(np.array_equal(one.down_N, other.down_N) and np.array_equal(one.up_N, other.up_N))


def correlation(one: FloatArray, other: FloatArray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("fading", [{"fading": "rayleigh"}, {"fading": "rician"}, {"fading": "none"}])
def test_the_mean_amplitude_is_that_of_the_path_loss(fading: dict[str, Any]) -> None:
    for amplitude_PN in amplitudes(channel(**fading)):
        assert amplitude_PN.mean(axis=0) == pytest.approx(np.ones(4), abs=0.04)  # 5 standard errors


def test_rayleigh_amplitudes_have_their_distribution() -> None:
    amplitude = np.sort(amplitudes(channel())[0].ravel())
    scale = math.sqrt(2 / math.pi)
    cdf = 1 - np.exp(-(amplitude**2) / (2 * scale**2))
    empirical = np.arange(1, amplitude.size + 1) / amplitude.size
    assert np.abs(cdf - empirical).max() < 1.95 / math.sqrt(amplitude.size)  # Kolmogorov-Smirnov at 0.1 %


def test_rician_fading_lies_between_rayleigh_and_none() -> None:
    spread = [amplitudes(channel(fading="rician", rician_k_db=k))[0].std() for k in (-40.0, 0.0, 6.0, 20.0, 60.0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[0] == pytest.approx(math.sqrt(4 / math.pi - 1), rel=0.03)  # Rayleigh's, for mean 1
    assert spread[-1] < 1e-3


@pytest.mark.parametrize(("ratio", "mean"), [(0.0, math.sqrt(math.pi) / 2), (1.0, 0.906454026), (1e6, 1 - 0.25e-6)])
def test_the_mean_rician_amplitude_is_its_closed_form(ratio: float, mean: float) -> None:
    assert rician_mean_amplitude(ratio) == pytest.approx(mean, abs=1e-9)


def test_without_fading_shadowing_and_blockage_the_rates_are_eq_2_and_3_on_an_even_split() -> None:
    radio = channel(fading="none")
    gain_N, noise = amplitude_gain(path_loss_db(DISTANCE_M_N, 3.5)), noise_w_per_hz(7)
    for links in (radio.links(3, 0.0), radio.mean_links()):
        assert links.down_bits_per_s_N == pytest.approx(rate_bits_per_s(25e6, 10, gain_N, noise))
        assert links.up_bits_per_s_N == pytest.approx(rate_bits_per_s(25e6, 0.2, gain_N, noise))


@pytest.mark.parametrize("medium", ["fdd", "tdd"])
def test_an_even_share_is_the_split_that_links_have_by_themselves(medium: str) -> None:
    radio = channel(medium=medium)
    for prompt in range(3):
        for rate_N, even_N in zip(radio.shared_links(prompt, np.full(4, 0.25)), radio.links(prompt), strict=True):
            np.testing.assert_array_equal(rate_N, even_N)


def test_shares_of_the_band_carry_eq_2_and_3_of_the_prompts_own_gains() -> None:
    radio, share_N, noise = channel(), np.array([0.4, 0.3, 0.2, 0.1]), noise_w_per_hz(7)
    for prompt in (2, 0):
        links, gains = radio.shared_links(prompt, share_N), radio.gains(prompt)
        assert links.down_bits_per_s_N == pytest.approx(rate_bits_per_s(share_N * 100e6, 10, gains.down_N, noise))
        assert links.up_bits_per_s_N == pytest.approx(rate_bits_per_s(share_N * 100e6, 0.2, gains.up_N, noise))


def test_a_report_without_error_is_the_true_quality_of_both_ways() -> None:
    radio, noise = channel(), noise_w_per_hz(7)
    for prompt in (1, 0):
        gains = radio.gains(prompt)
        expected_WN = [10 * gains.down_N**2 / noise, 0.2 * gains.up_N**2 / noise]
        np.testing.assert_allclose(radio.reported_snr_hz(prompt, 0.0), expected_WN)


def test_a_report_is_off_by_its_error_anew_for_every_prompt_device_and_way() -> None:
    radio = channel()
    error_db_PWN = np.array(
        [10 * np.log10(radio.reported_snr_hz(p, 2.0) / radio.reported_snr_hz(p, 0.0)) for p in range(500)]
    )
    assert error_db_PWN.std() == pytest.approx(2.0, rel=0.05)
    assert abs(error_db_PWN.mean()) < 0.2
    across = np.corrcoef(error_db_PWN.reshape(500, -1).T) - np.eye(8)
    assert np.abs(across).max() < 0.2
    assert len(np.unique(error_db_PWN)) == error_db_PWN.size


def test_reports_are_the_same_for_whoever_asks_and_change_no_channel() -> None:
    asked, unasked = channel(), channel()
    late = [asked.reported_snr_hz(prompt, 3.0) for prompt in (5, 2, 2)]
    np.testing.assert_array_equal(late[1], late[2])
    np.testing.assert_array_equal(late[0], channel().reported_snr_hz(5, 3.0))
    assert all(same(asked.gains(prompt), unasked.gains(prompt)) for prompt in range(7))
    one_more = channel(np.append(DISTANCE_M_N, 77.0)).reported_snr_hz(5, 3.0)
    np.testing.assert_array_equal(one_more[:, :4], late[0])


def test_the_mean_rates_know_nothing_of_what_was_drawn() -> None:
    drawn = channel(shadowing_db=8.0, blockage=BLOCKAGE, seed=5).mean_links()
    assert np.array_equal(drawn.down_bits_per_s_N, channel(fading="none").mean_links().down_bits_per_s_N)


def test_on_a_shared_medium_a_link_has_the_whole_band() -> None:
    shared = channel(fading="none", medium="shared").mean_links()
    even = channel(fading="none", medium="tdd", bandwidth_hz=400e6).mean_links()
    assert np.array_equal(shared.down_bits_per_s_N, even.down_bits_per_s_N)


@pytest.mark.parametrize("medium", ["tdd", "shared"])
def test_directions_on_one_frequency_are_reciprocal(medium: str) -> None:
    gains = channel(medium=medium, shadowing_db=6.0, blockage=BLOCKAGE).gains(7)
    assert np.array_equal(gains.down_N, gains.up_N)


def test_under_fdd_directions_fade_independently_but_share_shadowing_and_blockage() -> None:
    down_PN, up_PN = amplitudes(channel())
    assert abs(correlation(down_PN, up_PN)) < 0.05
    gains = channel(fading="none", shadowing_db=6.0, blockage=BLOCKAGE).gains(7)
    assert np.array_equal(gains.down_N, gains.up_N)


def test_devices_and_prompts_fade_independently() -> None:
    down_PN, _ = amplitudes(channel())
    off_diagonal = np.corrcoef(down_PN.T) - np.eye(4)
    assert np.abs(off_diagonal).max() < 0.08
    assert abs(correlation(down_PN[1:], down_PN[:-1])) < 0.05


def test_doppler_correlation_is_that_of_the_complex_gain() -> None:
    """Of a complex Gaussian process with correlation c, powers are correlated by c^2."""
    down_PN, _ = amplitudes(channel(doppler_correlation=0.9))
    power_PN = down_PN**2
    for lag in (1, 3):
        assert correlation(power_PN[lag:], power_PN[:-lag]) == pytest.approx(0.9 ** (2 * lag), abs=0.08)
    assert power_PN.mean() == pytest.approx(4 / math.pi, rel=0.12)


def test_blockage_has_its_long_run_share_length_and_loss() -> None:
    down_PN, _ = amplitudes(channel(np.full(8, 100.0), fading="none", blockage=BLOCKAGE), np.full(8, 100.0))
    blocked_PN = down_PN < 0.5
    assert set(np.round(down_PN, 9).ravel()) == {0.1, 1.0}
    assert blocked_PN.mean() == pytest.approx(0.25, abs=0.03)
    assert 1 - blocked_PN[1:][blocked_PN[:-1]].mean() == pytest.approx(0.3, abs=0.03)


def test_the_first_prompt_is_blocked_as_often_as_any() -> None:
    first_N = channel(np.full(2000, 100.0), fading="none", blockage=BLOCKAGE).gains(0).down_N
    assert (first_N < first_N.max() / 2).mean() == pytest.approx(0.25, abs=0.05)


def test_shadowing_is_drawn_once_per_device_with_its_deviation() -> None:
    distance_m_N = np.full(2000, 100.0)
    radio = channel(distance_m_N, fading="none", shadowing_db=6.0)
    loss_db_N = -20 * np.log10(radio.gains(0).down_N) - path_loss_db(distance_m_N, 3.5)
    assert loss_db_N.std() == pytest.approx(6.0, abs=0.5)
    assert loss_db_N.mean() == pytest.approx(0.0, abs=0.7)
    assert same(radio.gains(0), radio.gains(9))


@given(st.lists(st.integers(0, 30), max_size=12))
def test_draws_are_the_same_in_whatever_order_prompts_are_asked_for(order: list[int]) -> None:
    keys = {"doppler_correlation": 0.8, "blockage": BLOCKAGE, "shadowing_db": 4.0}
    asked, straight = channel(**keys), channel(**keys)
    expected = [straight.gains(prompt) for prompt in range(31)]
    assert all(same(asked.gains(prompt), expected[prompt]) for prompt in order)


def test_time_changes_nothing_and_nobody_can_change_a_draw() -> None:
    radio = channel()
    assert np.array_equal(radio.links(4, 0.0).up_bits_per_s_N, radio.links(4, 99.0).up_bits_per_s_N)
    with pytest.raises(ValueError, match="read-only"):
        radio.gains(4).down_N[0] = 1.0


def test_one_more_device_changes_no_draw_of_the_others() -> None:
    keys = {"medium": "fdd", "blockage": BLOCKAGE, "shadowing_db": 4.0}
    more, fewer = channel(**keys).gains(20), channel(DISTANCE_M_N[:3], **keys).gains(20)
    assert same(Gains(more.down_N[:3], more.up_N[:3]), fewer)


def test_one_more_effect_changes_no_draw_of_the_others() -> None:
    plain = channel().gains(20)
    shadowed, fixed = channel(shadowing_db=4.0).gains(20), channel(shadowing_db=4.0, fading="none").gains(20)
    path_gain_N = amplitude_gain(path_loss_db(DISTANCE_M_N, 3.5))
    assert shadowed.down_N == pytest.approx(plain.down_N * fixed.down_N / path_gain_N)
    assert np.array_equal(channel(medium="tdd").gains(20).down_N, plain.down_N)


def test_another_seed_is_another_channel() -> None:
    assert not np.array_equal(channel(seed=1).gains(0).down_N, channel(seed=2).gains(0).down_N)


def test_placements_are_uniform_in_distance_and_stay_when_a_device_is_added() -> None:
    section = PlacementSection(seed=3, min_m=50, max_m=500)
    distance_m_N = placements(section, 2000)
    assert distance_m_N.min() >= 50
    assert distance_m_N.max() <= 500
    assert np.histogram(distance_m_N, bins=3, range=(50, 500))[0] / 2000 == pytest.approx(np.full(3, 1 / 3), abs=0.05)
    assert np.array_equal(placements(section, 8), distance_m_N[:8])
    assert not np.array_equal(placements(section, 8, seed=4), distance_m_N[:8])


@pytest.mark.parametrize("distance_m", [0.0, -5.0, 0.5, math.nan, math.inf])
def test_an_impossible_distance_is_refused_by_device(distance_m: float) -> None:
    with pytest.raises(ConfigError, match=r"^device\[1\].distance_m: must be from 1 to 100000 m, not") as caught:
        channel(np.array([50.0, distance_m]))
    assert len(str(caught.value).splitlines()) == 1


def test_a_radio_needs_a_distance_for_every_device() -> None:
    with pytest.raises(ConfigError, match="one distance per device"):
        channel(np.array([]))


def test_a_link_too_weak_to_carry_anything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^device\[0\]: its uplink over 100000 m would carry .* bit/s"):
        channel(np.array([100_000.0]), device_power_w=1e-6)


def test_there_is_no_prompt_before_the_first() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        channel().gains(-1)


@pytest.mark.parametrize(
    "keys",
    [
        {"carrier_ghz": 0.0},
        {"bandwidth_hz": 0.0},
        {"bandwidth_hz": math.nan},
        {"station_power_w": 0.0},
        {"device_power_w": -1.0},
        {"noise_figure_db": -1.0},
        {"medium": "wifi"},
        {"fading": "nakagami"},
        {"rician_k_db": 100.0},
        {"shadowing_db": -1.0},
        {"doppler_correlation": 1.0},
        {"delay_s": -1.0},
        {"trace_max_gap_s": 0.0},
        {"bandwidth": 1e6},
        {"blockage": {"loss_db": 20.0, "p_block": 0.1}},
        {"blockage": {"loss_db": 20.0, "p_block": 0.0, "p_clear": 0.5}},
        {"blockage": {"loss_db": 0.0, "p_block": 0.1, "p_clear": 0.5}},
        {"placement": {"min_m": 0.0}},
        {"placement": {"min_m": 100.0, "max_m": 50.0}},
    ],
)
def test_a_key_out_of_range_or_unknown_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        RadioSection(**keys)
    assert caught.value.error_count() == 1


def test_a_run_file_is_told_which_radio_key_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("""name = "small"
[[device]]
name = "jetson-0"
[[policy]]
name = "topk"
[radio.blockage]
loss_db = 20
p_blok = 0.1
p_clear = 0.3
""")
    with pytest.raises(ConfigError, match=r'radio.blockage.p_blok: unknown key; did you mean "p_block"\?'):
        load_run_file(file)


def test_a_trace_stands_alone_but_for_what_it_leaves_open() -> None:
    RadioSection(trace="measured.csv", medium="shared", bandwidth_hz=20e6, delay_s=0.001, trace_max_gap_s=1)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="fading, placement: without effect where a trace gives the rates"):
        RadioSection(trace="measured.csv", fading="none", placement=PlacementSection())  # type: ignore[arg-type]
