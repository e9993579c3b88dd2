"""Energy out of power samples. The samples here are synthetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.experiment.energy import MeasuredEnergy, Power, idle_power_w, measured_energy

BOOT_NS = 10**18  # so late that a float cannot tell neighbouring nanoseconds apart
S = 10**9


def stamps(seconds: Any) -> Any:
    return BOOT_NS + (np.asarray(seconds) * 1e9).astype(np.int64)


def at(seconds: float) -> int:
    return BOOT_NS + int(seconds * S)


def every_second(power_w: Any) -> Power:
    return Power.of(stamps(np.arange(len(power_w))), power_w, 1.0)


def test_a_steady_power_gives_power_times_time() -> None:
    energy = measured_energy(every_second([5.0] * 30), at(3), at(23), idle_w=None)
    assert energy == MeasuredEnergy(pytest.approx(100.0), None, None, 21, pytest.approx(20.0))


def test_a_ramp_is_integrated_exactly_also_between_samples() -> None:
    energy = measured_energy(every_second(np.arange(30.0)), at(2.5), at(20.25), idle_w=None)
    assert energy is not None
    assert energy.total_j == pytest.approx((20.25**2 - 2.5**2) / 2)


def test_uneven_samples_weigh_by_the_time_between_them() -> None:
    power = Power.of(stamps([0, 1, 2, 4, 5, 6]), [2.0, 2.0, 2.0, 8.0, 8.0, 8.0], 1.0)
    energy = measured_energy(power, at(0), at(6), idle_w=None)
    assert energy is not None
    assert energy.total_j == pytest.approx(2 * 2 + 10 + 2 * 8)


def test_idle_power_is_shown_and_taken_off_for_the_whole_window() -> None:
    energy = measured_energy(every_second([7.0] * 30), at(5), at(15), idle_w=4.5)
    assert energy is not None
    assert energy.idle_w == 4.5
    assert energy.above_idle_j == pytest.approx(25.0)
    assert energy.joule_per_token(50) == pytest.approx(0.5)


def test_noise_around_idle_may_come_out_below_0_and_is_not_hidden() -> None:
    energy = measured_energy(every_second([4.0] * 30), at(5), at(15), idle_w=4.5)
    assert energy is not None
    assert energy.above_idle_j == pytest.approx(-5.0)


@pytest.mark.parametrize(("idle_w", "tokens"), [(None, 10), (4.0, 0)])
def test_without_idle_power_or_tokens_there_is_no_energy_per_token(idle_w: float | None, tokens: int) -> None:
    energy = measured_energy(every_second([7.0] * 30), at(5), at(15), idle_w)
    assert energy is not None
    assert energy.joule_per_token(tokens) is None


def test_one_lost_sample_is_filled_in() -> None:
    energy = measured_energy(every_second([6.0] * 9 + [None] + [6.0] * 10), at(0), at(19), idle_w=None)
    assert energy is not None
    assert energy.total_j == pytest.approx(6.0 * 19)
    assert energy.samples == 19


@pytest.mark.parametrize("first", [0, 8, 17])
def test_a_gap_beyond_three_intervals_leaves_the_energy_unknown(first: int) -> None:
    power_w = np.full(21, 6.0)
    power_w[first : first + 4] = math.nan
    assert measured_energy(every_second(power_w), at(0), at(20), idle_w=4.0) is None


def test_a_gap_that_a_window_begins_in_counts_whole() -> None:
    power = Power.of(stamps([0, 1, 2, 3, 7, 8, 9, 10, 11, 12]), [5.0] * 10, 1.0)
    assert measured_energy(power, at(6.5), at(12), idle_w=None) is None


def test_a_gap_outside_the_window_does_not_matter() -> None:
    power_w = np.full(40, 6.0)
    power_w[2:8] = math.nan
    assert measured_energy(every_second(power_w), at(8), at(30), idle_w=4.0) is not None


def test_samples_that_come_and_go_around_a_window_do_not_stand_for_what_is_in_it() -> None:
    power = Power.of(stamps([0, 1, 2, 3, 4, 5, 60, 61]), [5.0] * 8, 1.0)
    assert measured_energy(power, at(1), at(60.5), idle_w=4.0) is None


def test_a_board_without_power_has_no_energy_and_no_idle_power() -> None:
    for power in (every_second([None] * 20), every_second([])):
        assert measured_energy(power, at(0), at(10), idle_w=4.0) is None
        assert idle_power_w(power, [], []) is None


def test_a_window_of_too_few_samples_has_no_energy() -> None:
    assert measured_energy(every_second([5.0] * 30), at(10.5), at(14.5), idle_w=4.0) is None


def test_a_window_that_outlasts_the_samples_a_little_says_how_much_of_it_is_covered() -> None:
    energy = measured_energy(every_second([5.0] * 20), at(4), at(20.5), idle_w=None)
    assert energy is not None
    assert energy.covered_s == pytest.approx(15.0)
    assert energy.total_j == pytest.approx(5.0 * 16.5)


def test_idle_power_is_the_median_of_the_samples_before_the_first_round() -> None:
    power = every_second([4.0, 4.2, 9.0, 4.1, 4.3, *[12.0] * 10])
    assert idle_power_w(power, [at(4.5)], [at(15)]) == pytest.approx(4.2)


def test_a_sample_right_after_a_round_is_not_at_rest_yet() -> None:
    power = every_second([4.0] * 5 + [12.0] * 5 + [10.0, 10.0] + [5.0] * 20)
    assert idle_power_w(power, [at(4.5)], [at(9.5)]) == pytest.approx(5.0)
    assert idle_power_w(power, [at(4.5)], [at(9.5)], settle_s=100.0) == pytest.approx(4.0)


def test_a_long_round_hides_the_short_ones_within_it() -> None:
    power = every_second([4.0] * 6 + [12.0] * 20)
    assert idle_power_w(power, [at(5.5), at(6), at(7)], [at(26), at(6.1), at(7.1)]) == pytest.approx(4.0)


def test_a_device_that_was_never_at_rest_has_no_idle_power() -> None:
    assert idle_power_w(every_second([9.0] * 30), stamps(np.arange(30)), stamps(np.arange(30) + 0.9)) is None


@given(st.lists(st.floats(0, 60), min_size=30, max_size=30), st.floats(0, 4), st.floats(10, 15), st.floats(22, 29))
def test_parts_of_a_window_add_up_and_lie_within_the_least_and_most_power(
    power_w: list[float], start_s: float, middle_s: float, end_s: float
) -> None:
    power, ends = every_second(power_w), (at(start_s), at(middle_s), at(end_s))
    pairs = [(ends[0], ends[2]), (ends[0], ends[1]), (ends[1], ends[2])]
    whole, first, second = (energy.total_j for pair in pairs if (energy := measured_energy(power, *pair, 1.0)))
    length_s = (ends[2] - ends[0]) / S
    assert min(power_w) * length_s - 1e-6 <= whole <= max(power_w) * length_s + 1e-6
    assert first + second == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    ("time_ns", "power_w", "interval_s"),
    [([1, 2], [1.0], 1.0), ([2, 2], [1.0, 1.0], 1.0), ([2, 1], [1.0, 1.0], 1.0), ([1], [-1.0], 1.0), ([1], [1.0], 0.0)],
)
def test_samples_that_cannot_be_are_refused(time_ns: Any, power_w: Any, interval_s: float) -> None:
    with pytest.raises(ValueError, match=r"stamp|power"):
        Power.of(time_ns, power_w, interval_s)


def test_a_window_or_a_round_that_ends_before_it_starts_is_refused() -> None:
    power = every_second([5.0] * 9)
    with pytest.raises(ValueError, match="window"):
        measured_energy(power, at(4), at(4), None)
    with pytest.raises(ValueError, match="busy interval"):
        idle_power_w(power, [at(4)], [at(3)])
