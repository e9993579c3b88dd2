"""Steering, on a simulated plant: latency falls with strength, is noisy, and differs threefold from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from testbed.errors import ConfigError
from testbed.policies.base import Policy, Routing, Selection, State
from testbed.policies.steering import Steered
from testbed.policies.topk import TopK

LAYERS, NOISE, SEEDS = 8, 0.3, 40
Floats = NDArray[np.float64]


class Toy:
    """A policy of which only the strength matters; it leaves it in the weights."""

    name, strength_name = "toy", "theta"

    def __init__(self, strongest: float = 0.5, theta: float = 0.0, k: int = 2) -> None:
        self.strongest = strongest
        self.params: Mapping[str, Any] = {"theta": theta, "k": k}

    def with_strength(self, value: float) -> Toy:
        return Toy(self.strongest, value, self.params["k"])

    def select(self, routing: Routing, state: State) -> Selection:  # noqa: ARG002 - as all policies
        return Selection(routing.expert_TK, np.full(routing.expert_TK.shape, self.params["theta"]))


@dataclass(frozen=True)
class Plant:
    """Mean latency (1 at strength 0) and mean dropped mass of a strength, roughly as policies were seen to behave."""

    strongest: float
    latency: Callable[[float], float]
    mass: Callable[[float], float]


RATIO = Plant(0.5, lambda theta: math.exp(-1.15 * theta), lambda theta: 0.5 * theta**2)
BUDGET = Plant(0.5, lambda budget: math.exp(-1.4 * math.sqrt(budget)), lambda budget: budget)
STEEP = Plant(0.2, lambda budget: math.exp(-1.8 * math.sqrt(budget)), lambda budget: 0.8 * budget)
PLANTS = pytest.mark.parametrize("plant", [RATIO, BUDGET, STEEP], ids=["ratio", "budget", "steep"])


@dataclass(frozen=True)
class Trajectories:
    """Of every seed and round, noise and layers taken out. B rounds."""

    latency_SB: Floats
    mass_SB: Floats
    strength_SB: Floats
    saturated_SB: NDArray[np.bool_]


def drive(
    plant: Plant,
    rounds: int,
    *,
    target_s: float | None = None,
    dropped_mass: float | None = None,
    channel: Callable[[int], float] = lambda _: 1.0,
) -> Trajectories:
    seen = np.empty((4, SEEDS, rounds))
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        load_L = np.exp(rng.uniform(0, math.log(3), LAYERS))
        load_L /= load_L.mean()
        noise_2B = np.exp(rng.normal(-(NOISE**2) / 2, NOISE, (2, rounds)))
        steered = Steered(Toy(plant.strongest), target_s, dropped_mass)
        for number in range(rounds):
            strength = steered.strength
            latency, mass = plant.latency(strength) * channel(number), plant.mass(strength)
            block_s = latency * load_L[number % LAYERS] * noise_2B[0, number]
            steered.observe(0, block_s, mass * load_L[-1 - number % LAYERS] * noise_2B[1, number])
            seen[:, seed, number] = latency, mass, strength, steered.saturated
    return Trajectories(seen[0], seen[1], seen[2], seen[3] > 0)


def typical_miss(value_SB: Floats, goal: float, rounds: slice) -> float:
    """Median over the seeds of how far the mean over these rounds is off the goal."""
    return float(np.median(np.abs(value_SB[:, rounds].mean(axis=1) / goal - 1)))


@PLANTS
@pytest.mark.parametrize("target_s", [0.9, 0.78, 0.7])
def test_the_mean_latency_is_within_a_tenth_of_the_target_after_60_blocks_and_stays(
    plant: Plant, target_s: float
) -> None:
    run = drive(plant, 160, target_s=target_s)
    assert typical_miss(run.latency_SB, target_s, slice(60, 80)) < 0.1
    assert typical_miss(run.latency_SB, target_s, slice(80, 160)) < 0.05


@PLANTS
def test_strength_does_not_swing_once_it_has_settled(plant: Plant) -> None:
    for_time, for_quality = drive(plant, 300, target_s=0.78), drive(plant, 300, dropped_mass=0.02)
    assert np.median(for_time.latency_SB[:, 100:].std(axis=1)) < 0.1 * 0.78
    assert np.median(for_quality.mass_SB[:, 100:].std(axis=1)) < 0.15 * 0.02


@PLANTS
@pytest.mark.parametrize("factor", [1.2, 0.85])
def test_a_step_in_the_channel_is_made_up_for_within_60_blocks(plant: Plant, factor: float) -> None:
    run = drive(plant, 180, target_s=0.8, channel=lambda number: factor if number >= 100 else 1.0)
    assert typical_miss(run.latency_SB, 0.8, slice(160, 180)) < 0.1


@PLANTS
def test_a_target_above_the_unsteered_latency_leaves_the_model_alone(plant: Plant) -> None:
    run = drive(plant, 160, target_s=1.5)
    assert np.mean(run.strength_SB == 0) > 0.95
    assert run.strength_SB.max() < 0.005 * plant.strongest
    assert not run.saturated_SB.any()


@PLANTS
def test_a_target_out_of_reach_saturates_and_says_so(plant: Plant) -> None:
    run = drive(plant, 160, target_s=0.8 * plant.latency(plant.strongest))
    assert np.median(run.strength_SB[:, 60:]) == plant.strongest
    assert run.saturated_SB[:, 60:].mean() > 0.98
    assert not run.saturated_SB[:, :8].any()


@PLANTS
def test_long_saturation_does_not_delay_the_way_back(plant: Plant) -> None:
    run = drive(plant, 460, target_s=0.8, channel=lambda number: 3.0 if number < 400 else 0.95)
    assert run.saturated_SB[:, 399].all()
    assert typical_miss(run.latency_SB, 0.8, slice(440, 460)) < 0.1
    assert run.saturated_SB[:, -1].mean() < 0.1


@PLANTS
def test_a_quality_budget_alone_is_spent_in_the_mean_and_not_more(plant: Plant) -> None:
    run = drive(plant, 300, dropped_mass=0.02)
    assert typical_miss(run.mass_SB, 0.02, slice(120, 300)) < 0.05
    assert np.median(run.mass_SB.mean(axis=1)) < 0.02 * 1.02


@PLANTS
def test_the_quality_budget_goes_before_the_latency_target(plant: Plant) -> None:
    run = drive(plant, 300, target_s=0.5, dropped_mass=0.01)
    assert np.median(run.mass_SB[:, 40:].mean(axis=1)) < 0.01 * 1.05
    assert np.median(np.lib.stride_tricks.sliding_window_view(run.mass_SB, 32, axis=1).mean(axis=2).max(axis=1)) < 0.015
    assert run.saturated_SB[:, 100:].mean() > 0.9


@PLANTS
def test_a_loose_quality_budget_does_not_hold_the_target_up(plant: Plant) -> None:
    run = drive(plant, 160, target_s=0.78, dropped_mass=0.3)
    assert typical_miss(run.latency_SB, 0.78, slice(60, 80)) < 0.1
    assert typical_miss(run.latency_SB, 0.78, slice(80, 160)) < 0.05


def test_with_both_the_limit_bites_again_as_soon_as_a_bad_channel_asks_for_more() -> None:
    run = drive(BUDGET, 400, target_s=0.9, dropped_mass=0.02, channel=lambda number: 2.0 if number >= 300 else 1.0)
    assert np.median(run.mass_SB[:, 300:].mean(axis=1)) < 0.02 * 1.2
    assert typical_miss(run.mass_SB, 0.02, slice(340, 400)) < 0.1


def test_one_stalled_block_does_not_move_the_strength_as_a_slow_channel_does() -> None:
    stalled, slow = Steered(Toy(), 1.0), Steered(Toy(), 1.0)
    stalled.observe(0, 1000.0, 0.0)
    for _ in range(40):
        stalled.observe(0, 1.0, 0.0)
        slow.observe(0, 2.0, 0.0)
    assert stalled.strength < 0.1 * slow.strength


@given(
    st.floats(1e-6, 1e3),
    st.none() | st.floats(1e-6, 1),
    st.lists(st.tuples(st.sampled_from([0, 1]), st.floats(), st.floats()), max_size=60),
    st.floats(0.01, 1),
)
def test_whatever_is_observed_the_strength_lies_within_its_bounds(
    target_s: float, dropped_mass: float | None, seen: list[tuple[int, float, float]], strongest: float
) -> None:
    steered = Steered(Toy(strongest), target_s, dropped_mass)
    for phase, block_s, mass in seen:
        steered.observe(phase, block_s, mass)
        for begun in (0, 1):
            steered.begin(begun)
            assert 0 <= steered.strength <= strongest
            assert steered.saturated == (steered.saturated_rounds > 0)


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -1.0])
def test_what_is_no_measurement_changes_nothing(nothing: float) -> None:
    steered = Steered(Toy(), 1.0, 0.1)
    for _ in range(20):
        steered.observe(0, 2.0, 0.0)
    before = steered.strength
    steered.observe(0, nothing, nothing)
    assert steered.strength == before > 0


def test_prefill_and_decode_are_steered_apart() -> None:
    steered = Steered(Toy(), 1.0)
    for _ in range(30):
        steered.observe(1, 2.0, 0.0)
    assert steered.strength == 0
    steered.begin(1)
    assert steered.strength > 0
    steered.begin(0)
    assert steered.strength == 0


@pytest.mark.parametrize("own", [0.0, 0.2, 0.5])
def test_steering_starts_at_the_policys_own_strength(own: float) -> None:
    assert Steered(Toy(theta=own), 1.0).strength == pytest.approx(own)
    assert Steered(Toy(theta=own), dropped_mass=0.1).strength == pytest.approx(own)


def test_the_policy_answers_at_the_strength_of_the_moment_and_does_not_change_by_answering() -> None:
    steered = Steered(Toy(), 1.0)
    routing = Routing(0, np.zeros((3, 2), np.int64), np.ones((3, 2)), np.ones((1, 1), bool))
    zero_N = np.zeros(1)
    state = State(zero_N, zero_N == 0, zero_N, zero_N, zero_N, zero_N)
    assert not steered.select(routing, state).weight_TK.any()
    for _ in range(30):
        steered.observe(0, 2.0, 0.0)
    answers = [steered.select(routing, state).weight_TK for _ in range(3)]
    assert all((answer == steered.strength).all() for answer in answers)
    assert steered.strength > 0


def test_it_is_a_policy_that_log_and_table_can_call_by_name() -> None:
    steered = Steered(Toy(), target_s=0.02, dropped_mass=0.05)
    assert isinstance(steered, Policy)
    assert steered.name == "toy"
    assert steered.params == {"k": 2, "target_ms": 20.0, "quality_budget": 0.05}
    assert Steered(Toy(), dropped_mass=0.05).params == {"k": 2, "quality_budget": 0.05}


def test_a_policy_without_a_strength_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^policy topk: it has no strength to steer; .*$"):
        Steered(TopK(), target_s=0.1)


@pytest.mark.parametrize(
    ("target_s", "dropped_mass", "words"),
    [
        (None, None, "needs a target latency, a quality budget or both"),
        (0.0, None, "the target must be a block's time above 0 s, not 0.0"),
        (math.inf, None, "the target must be"),
        (math.nan, None, "the target must be"),
        (True, None, "the target must be"),
        (1.0, 0.0, "the quality budget is a share of gate mass above 0, at most 1, not 0.0"),
        (None, 1.5, "the quality budget is"),
        (None, "0.1", "the quality budget is"),
    ],
)
def test_impossible_goals_are_refused_in_one_line(target_s: Any, dropped_mass: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^policy toy: .*{words}.*$"):
        Steered(Toy(), target_s, dropped_mass)
