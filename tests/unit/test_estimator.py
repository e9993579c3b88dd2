from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.latency.estimator import Estimator, Lesson, Prediction

ROW_BYTES, HEADER_BYTES, LAYERS = 4100, 100, 4
ALL_3 = np.ones(3, bool)
SEEDS = pytest.mark.parametrize("seed", range(5))
NAN = math.nan


def block_bytes(rows: int) -> int:
    return rows * ROW_BYTES + HEADER_BYTES


@dataclass
class Device:
    """A device as it truly is: nodes of a few hundred microseconds a row, links of some 80 Mbit/s."""

    rng: np.random.Generator
    noise: float = 0.04
    compute_factor: float = 1.0
    rate_bits_per_s: dict[str, float] = field(default_factory=lambda: {"down": 80e6, "up": 25e6})

    def true_s(self, rows: int, experts: int) -> Prediction:
        bits = block_bytes(rows) * 8
        compute_s = self.compute_factor * (3e-4 + 8e-4 * experts + 3e-4 * rows)
        return Prediction(
            compute_s, 5e-4 + bits / self.rate_bits_per_s["down"], 8e-4 + bits / self.rate_bits_per_s["up"]
        )

    def lesson(self, rows: int, experts: int, *, one_way: bool = True) -> Lesson:
        compute_s, down_s, up_s = np.array(self.true_s(rows, experts)) * self.rng.lognormal(0, self.noise, 3)
        ways = {"down_s": down_s, "up_s": up_s} if one_way else {"link_s": down_s + up_s}
        return Lesson(rows, experts, block_bytes(rows), block_bytes(rows), compute_s, **ways)

    def fade(self, mean_snr: float = 100.0) -> None:
        """Rayleigh: a new gain per direction, against which rate = B log2(1 + SNR g^2)."""
        for direction, bandwidth_hz in (("down", 12.5e6), ("up", 5e6)):
            gain = self.rng.rayleigh(math.sqrt(0.5))
            self.rate_bits_per_s[direction] = bandwidth_hz * math.log2(1 + mean_snr * gain**2)


def rounds_of(rng: np.random.Generator, prompts: int) -> Iterator[tuple[int, int, int]]:
    """(prompt, rows, experts touched): four layers a prompt, every third prompt a decode of one row."""
    for prompt in range(prompts):
        for _ in range(LAYERS):
            rows = 1 if prompt % 3 == 2 else int(rng.integers(5, 61))
            yield prompt, rows, min(rows, int(rng.integers(1, 4)))


def one() -> Estimator:
    return Estimator(1, ROW_BYTES, ROW_BYTES, header_bytes=HEADER_BYTES)


def taught(seed: int = 0, noise: float = 0.04, prompts: int = 8) -> tuple[Estimator, Device]:
    """A device known for some prompts."""
    rng = np.random.default_rng(seed)
    estimator, device = one(), Device(rng, noise)
    for _, rows, experts in rounds_of(rng, prompts):
        estimator.teach(0, device.lesson(rows, experts), 0.0)
    return estimator, device


def predict(estimator: Estimator, rows: int, experts: int = 1) -> Prediction:
    return estimator.predict(0, rows, experts, block_bytes(rows), block_bytes(rows))


def token_s(estimator: Estimator) -> float:
    return float(estimator.state(0, np.ones(1, bool), 0.0).token_s_N[0])


def errors_of(seed: int, noise: float, *, fading: bool, prompts: int) -> np.ndarray:
    """Relative errors of what was predicted before each round from the second prompt on: (rounds, 3 parts)."""
    rng = np.random.default_rng(seed)
    estimator, device, errors, prompt = one(), Device(rng, noise), [], -1
    for now, rows, experts in rounds_of(rng, prompts):
        if fading and now > prompt:
            device.fade()
        prompt = now
        lesson = device.lesson(rows, experts)
        if prompt:
            predicted = np.array(predict(estimator, rows, experts))
            errors.append(np.abs(predicted / [lesson.compute_s, lesson.down_s, lesson.up_s] - 1))
        estimator.teach(0, lesson, 0.0)
    return np.array(errors)


@SEEDS
@pytest.mark.parametrize("noise", [0.03, 0.05])
def test_on_static_links_each_part_of_a_round_is_predicted_within_10_percent(seed: int, noise: float) -> None:
    errors = errors_of(seed, noise, fading=False, prompts=24)
    assert (np.median(errors, axis=0) < 0.10).all()
    assert (np.median(errors[:LAYERS], axis=0) < 0.15).all()  # the second prompt alone: four rounds


@SEEDS
def test_under_rayleigh_fading_at_every_prompt_each_part_is_predicted_within_25_percent(seed: int) -> None:
    errors = errors_of(seed, 0.05, fading=True, prompts=48)
    assert (np.median(errors, axis=0) < [0.10, 0.25, 0.25]).all()


@SEEDS
def test_where_only_the_sum_of_both_ways_is_known_the_sum_is_predicted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimator, device, errors = one(), Device(rng), []
    for prompt, rows, experts in rounds_of(rng, 24):
        lesson, predicted = device.lesson(rows, experts, one_way=False), predict(estimator, rows, experts)
        if prompt:
            errors.append(abs((predicted.down_s + predicted.up_s) / lesson.link_s - 1))
        estimator.teach(0, lesson, 0.0)
    assert np.median(errors) < 0.10


def test_a_sum_is_split_as_the_directions_were_before() -> None:
    estimator, _ = taught()
    before = predict(estimator, 30)
    for _ in range(20):
        size = block_bytes(30)
        estimator.teach(0, Lesson(30, 1, size, size, 0.01, link_s=2 * (before.down_s + before.up_s)), 0.0)
    after = predict(estimator, 30)
    assert after.down_s + after.up_s == pytest.approx(2 * (before.down_s + before.up_s), rel=0.02)
    assert after.down_s / after.up_s == pytest.approx(before.down_s / before.up_s, rel=0.02)


def test_a_direction_that_a_clock_error_leaves_without_time_is_taken_from_the_sum() -> None:
    with_error, with_sum = taught()[0], taught()[0]
    size = block_bytes(30)
    with_error.teach(0, Lesson(30, 1, size, size, 0.01, down_s=-0.001, up_s=0.053), 0.0)
    with_sum.teach(0, Lesson(30, 1, size, size, 0.01, link_s=0.052), 0.0)
    assert predict(with_error, 30) == pytest.approx(predict(with_sum, 30))


@SEEDS
def test_a_device_ten_times_slower_is_known_after_2_rounds_and_forgiven_2_after_its_recovery(seed: int) -> None:
    estimator, device = taught(seed)
    old_s = token_s(estimator)
    device.compute_factor = 10.0
    device.rate_bits_per_s = {"down": 8e6, "up": 2.5e6}
    for rows in (33, 12):
        estimator.teach(0, device.lesson(rows, 1), 0.0)
    assert token_s(estimator) > 5 * old_s
    for rows in (20, 50, 9, 1):
        estimator.teach(0, device.lesson(rows, 1), 0.0)
    device.compute_factor = 1.0
    device.rate_bits_per_s = {"down": 80e6, "up": 25e6}
    for rows in (1, 1):
        estimator.teach(0, device.lesson(rows, 1), 0.0)
    assert token_s(estimator) < 1.5 * old_s


@SEEDS
@pytest.mark.parametrize("factor", [20.0, 0.05])
@pytest.mark.parametrize("rows", [1, 40])
def test_one_outlier_moves_no_prediction_by_more_than_half_and_is_undone_by_the_next_lessons(
    seed: int, factor: float, rows: int
) -> None:
    estimator, device = taught(seed)
    before = {size: np.array(predict(estimator, size)) for size in (1, 10, 60)}
    true = device.lesson(rows, 1)
    estimator.teach(
        0, true._replace(compute_s=true.compute_s * factor, down_s=true.down_s * factor, up_s=true.up_s * factor), 0.0
    )
    for size, seconds in before.items():
        moved = np.array(predict(estimator, size)) / seconds
        assert (moved < 1.5).all()
        assert (moved > 1 / 1.5).all()
    for size in (30, 15, 1):
        estimator.teach(0, device.lesson(size, 1), 0.0)
    assert token_s(estimator) == pytest.approx(device.true_s(1, 1).total_s, rel=0.25)


@SEEDS
def test_a_wrong_shape_does_not_last(seed: int) -> None:
    """A device whose rounds all cost alike, after its rows alone had cost: no level explains that."""
    rng = np.random.default_rng(seed)
    estimator = one()
    for constant_s, row_s, lessons in ((0.0, 1e-4, 40), (1e-2, 1e-5, 120)):
        for number in range(lessons):
            rows = 1 if number % 2 else 60
            seconds = (constant_s + row_s * rows) * rng.lognormal(0, 0.04)
            size = block_bytes(rows)
            estimator.teach(0, Lesson(rows, 1, size, size, seconds, seconds, seconds), 0.0)
    for rows in (1, 60):
        assert np.array(predict(estimator, rows)) == pytest.approx(1e-2 + 1e-5 * rows, rel=0.2)


def test_a_device_that_always_gets_the_same_is_predicted_right_there_and_sanely_elsewhere() -> None:
    rng = np.random.default_rng(0)
    estimator, device = one(), Device(rng)
    for _ in range(200):
        estimator.teach(0, device.lesson(20, 1), 0.0)
    at_20 = np.array(predict(estimator, 20))
    assert at_20 == pytest.approx(np.array(device.true_s(20, 1)), rel=0.1)
    assert (np.array(predict(estimator, 1)) < at_20).all()
    assert (np.array(predict(estimator, 1)) > at_20 / 20.001).all()
    assert (np.array(predict(estimator, 60)) < 3.001 * at_20).all()
    assert (np.array(predict(estimator, 60)) >= at_20).all()


def test_without_noise_the_coefficients_themselves_are_found() -> None:
    estimator, _ = taught(noise=0.0, prompts=30)
    compute_s = [estimator.predict(0, rows, experts, 1, 1).compute_s for rows, experts in ((1, 1), (1, 2), (2, 1))]
    down_s = [estimator.predict(0, 1, 1, 1000 * size, 1).down_s for size in (1, 2)]
    up_s = [estimator.predict(0, 1, 1, 1, 1000 * size).up_s for size in (1, 2)]
    assert np.diff(compute_s[:2]) == pytest.approx([8e-4], rel=0.05)
    assert compute_s[2] - compute_s[0] == pytest.approx(3e-4, rel=0.05)
    assert compute_s[0] == pytest.approx(14e-4, rel=0.05)
    assert (down_s[1] - down_s[0], up_s[1] - up_s[0]) == pytest.approx((8000 / 80e6, 8000 / 25e6), rel=0.05)
    assert (down_s[0], up_s[0]) == pytest.approx((5e-4 + 8000 / 80e6, 8e-4 + 8000 / 25e6), rel=0.05)


def test_a_lost_reply_raises_the_prediction_to_the_deadline_and_the_next_reply_lowers_it_again() -> None:
    estimator, device = taught()
    before_s = token_s(estimator)
    estimator.teach_at_least(0, 20, 1, 10.0, 5.0)
    assert predict(estimator, 20).total_s == pytest.approx(10.0)
    assert token_s(estimator) > 100 * before_s
    assert estimator.ages(6.0)[0] == 1.0
    estimator.teach(0, device.lesson(20, 1), 6.0)
    assert token_s(estimator) == pytest.approx(before_s, rel=0.1)


def test_a_lost_reply_that_was_expected_to_be_late_changes_nothing() -> None:
    estimator, _ = taught()
    before = predict(estimator, 20)
    estimator.teach_at_least(0, 20, 1, before.total_s / 2, 5.0)
    assert predict(estimator, 20) == before


def test_a_reply_that_comes_after_all_says_itself_how_late_it_was() -> None:
    estimator, device = taught()
    late = device.lesson(20, 1)._replace(compute_s=12.0)
    estimator.teach_at_least(0, 20, 1, 10.0, 0.0)
    estimator.teach(0, late, 2.0)
    assert 10.0 * (1 - 1e-9) <= predict(estimator, 20).total_s <= late.compute_s + late.down_s + late.up_s
    estimator.teach(0, late, 14.0)
    assert predict(estimator, 20).compute_s == pytest.approx(12.0, rel=0.1)
    for _ in range(2):
        estimator.teach(0, device.lesson(20, 1), 20.0)
    assert predict(estimator, 20).total_s == pytest.approx(device.true_s(20, 1).total_s, rel=0.2)


def test_a_device_whose_first_reply_is_lost_costs_the_deadline_until_one_comes() -> None:
    estimator, device = one(), Device(np.random.default_rng(0))
    estimator.teach_at_least(0, 4, 2, 3.0, 0.0)
    assert predict(estimator, 4, 2).total_s == pytest.approx(3.0)
    assert estimator.lessons_N[0] == 0
    lesson = device.lesson(20, 1)
    estimator.teach(0, lesson, 1.0)
    assert np.array(predict(estimator, 20)) == pytest.approx([lesson.compute_s, lesson.down_s, lesson.up_s])


def test_a_returned_device_keeps_its_fit_until_two_lessons_say_otherwise() -> None:
    estimator, device = taught()
    before_s = token_s(estimator)
    estimator.teach_at_least(0, 20, 1, 10.0, 0.0)
    estimator.forget(0)
    assert token_s(estimator) == pytest.approx(before_s)
    device.compute_factor = 5.0
    for rows in (1, 20):
        estimator.teach(0, device.lesson(rows, 1), 1.0)
    assert predict(estimator, 20).compute_s == pytest.approx(device.true_s(20, 1).compute_s, rel=0.2)


def test_a_device_never_measured_is_unknown_and_not_0() -> None:
    estimator = Estimator(3, ROW_BYTES, ROW_BYTES)
    estimator.teach(1, Device(np.random.default_rng(0)).lesson(10, 1), 4.0)
    state = estimator.state(1, ALL_3, now_s=5.0)
    for values_N in (state.token_s_N, state.base_s_N, state.expert_s_N, state.row_s_N, state.age_s_N):
        assert np.isnan(values_N).tolist() == [True, False, True]
    assert state.age_s_N[1] == estimator.ages(5.0)[1] == 1.0
    assert estimator.lessons_N.tolist() == [0, 1, 0]
    assert math.isnan(estimator.predict(0, 1, 1, 100, 100).total_s)
    assert np.isnan(estimator.air_row_s_WN()[:, 2]).all()


def test_a_state_prices_a_round_as_the_prediction_does() -> None:
    estimator, _ = taught()
    state = estimator.state(0, np.ones(1, bool), 0.0)
    for rows, experts in ((1, 1), (40, 3)):
        cost_s_N = state.cost_s_N(np.array([rows]), np.array([experts]))
        assert cost_s_N[0] == pytest.approx(predict(estimator, rows, experts).total_s)
    assert state.token_s_N[0] == pytest.approx(predict(estimator, 1).total_s)
    compute_row_s = estimator.predict(0, 2, 1, 1, 1).compute_s - estimator.predict(0, 1, 1, 1, 1).compute_s
    assert state.row_s_N[0] == pytest.approx(compute_row_s + estimator.air_row_s_WN()[:, 0].sum())


def test_a_state_stays_as_it_was_when_lessons_go_on() -> None:
    estimator, device = taught()
    available_N = np.ones(1, bool)
    state = estimator.state(0, available_N, 1.0)
    before = [values_N.tolist() for values_N in (state.token_s_N, state.row_s_N, state.age_s_N)]
    estimator.teach(0, device.lesson(60, 1)._replace(compute_s=1.0), 2.0)
    available_N[:] = False
    assert [values_N.tolist() for values_N in (state.token_s_N, state.row_s_N, state.age_s_N)] == before
    assert state.available_N.tolist() == [True]


GOOD = Lesson(10, 1, 41_100, 41_100, 0.01, 0.004, 0.004)


@pytest.mark.parametrize(
    "lesson",
    [GOOD._replace(**{name: 0}) for name in ("rows", "experts", "bytes_down", "bytes_up")]
    + [GOOD._replace(compute_s=seconds) for seconds in (-0.1, NAN, math.inf, 1e6)]
    + [GOOD._replace(down_s=math.inf), GOOD._replace(down_s=-1.0), GOOD._replace(up_s=NAN)]
    + [GOOD._replace(down_s=NAN, up_s=NAN, link_s=seconds) for seconds in (NAN, -0.1)]
    + [GOOD._replace(compute_s=0.0, down_s=0.0, up_s=0.0)],
)
def test_what_cannot_be_a_measurement_teaches_nothing(lesson: Lesson) -> None:
    estimator = one()
    with pytest.raises(ValueError, match="device 0"):
        estimator.teach(0, lesson, 0.0)
    assert math.isnan(token_s(estimator))
    assert math.isnan(estimator.ages(1.0)[0])


@pytest.mark.parametrize(("rows", "experts", "seconds"), [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0), (1, 1, NAN)])
def test_what_cannot_be_a_deadline_teaches_nothing(rows: int, experts: int, seconds: float) -> None:
    estimator = one()
    with pytest.raises(ValueError, match="device 0"):
        estimator.teach_at_least(0, rows, experts, seconds, 0.0)
    assert math.isnan(token_s(estimator))


@pytest.mark.parametrize("device", [-1, 1])
def test_a_device_that_is_not_there_is_refused(device: int) -> None:
    estimator = one()
    for call in (
        lambda: estimator.teach(device, GOOD, 0.0),
        lambda: estimator.teach_at_least(device, 1, 1, 1.0, 0.0),
        lambda: estimator.predict(device, 1, 1, 1, 1),
        lambda: estimator.forget(device),
    ):
        with pytest.raises(ValueError, match=f"no device {device}"):
            call()


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_estimator_of_no_devices_or_no_bytes_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Estimator(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        Estimator(1, 1, 1, memory_rounds=0)


seconds_s = st.floats(0, 10_000) | st.floats(1e-6, 0.1)
lessons = st.builds(
    Lesson,
    rows=st.integers(1, 10**6),
    experts=st.integers(1, 256),
    bytes_down=st.integers(1, 2**30),
    bytes_up=st.integers(1, 2**30),
    compute_s=st.floats(1e-9, 10_000) | st.floats(1e-6, 0.1),
    down_s=seconds_s | st.just(NAN),
    up_s=seconds_s,
    link_s=seconds_s,
)
losses = st.tuples(st.integers(1, 1000), st.integers(1, 8), st.floats(1e-3, 1000))


@given(st.lists(lessons | losses | st.none(), min_size=1, max_size=40))
def test_whatever_is_taught_predictions_stay_finite_not_negative_and_monotone(
    events: list[Lesson | tuple[int, int, float] | None],
) -> None:
    estimator = one()
    for event in events:
        if event is None:
            estimator.forget(0)
        elif isinstance(event, Lesson):
            estimator.teach(0, event, 0.0)
        else:
            estimator.teach_at_least(0, *event, 0.0)
            assert predict(estimator, *event[:2]).total_s >= event[2] * (1 - 1e-9)
    if not any(events):
        return  # still unknown
    smaller = estimator.predict(0, 1, 1, 100, 100)
    assert all(0 <= seconds < math.inf for seconds in smaller)
    assert smaller.total_s > 0
    for larger in (
        (2, 1, 100, 100),
        (1, 2, 100, 100),
        (1, 1, 10**9, 100),
        (1, 1, 100, 10**9),
        (10**6, 64, 10**9, 10**9),
    ):
        predicted = estimator.predict(0, *larger)
        assert all(low <= high < math.inf for low, high in zip(smaller, predicted, strict=True))
    assert ((estimator.air_row_s_WN() >= 0) & (estimator.air_row_s_WN() < math.inf)).all()
