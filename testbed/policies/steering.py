"""A policy's strength set online: blocks take the time asked for, or drop the gate mass allowed, in the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from testbed.errors import ConfigError
from testbed.policies.base import Policy, Routing, Selection, State

SMOOTHING = 0.2  # weight of the newest block in the mean, which so spans about ten of them
OUTLIER = 4.0  # one block counts at most as this many times the mean, or the goal: a stall is not a slow channel
LEAST_LOG, MOST_LOG = -2.0, 1.0  # errors beyond say no more
LATENCY_GAIN, MASS_GAIN = 0.1, -0.05  # of the position, per unit of log error; more strength drops more mass
LEAST_POSITION = 0.1  # below it the mass's step no longer shrinks with the position
SLACK = 0.1  # how far the loop that does not decide may run ahead of the one that does
AT_LIMIT = 0.05  # a loop this near to the most that it may ask for does not reach its goal


@runtime_checkable
class SteerablePolicy(Policy, Protocol):
    """A policy with a strength: at 0 it is the unmodified model, `strongest` is the most that may be asked of it."""

    strength_name: str  # its key in `params`
    strongest: float

    def with_strength(self, value: float) -> Policy: ...


class Steered:
    """Wraps a policy and moves its strength after every round, in prefill and decode separately.

    target_s: emulated seconds of a block, held by the arithmetic mean over recent blocks (not by the median): the mean
    times the number of blocks is a prompt's time, and layers whose loads differ may then miss it one by one.
    dropped_mass: share of the gate's weight, 0 to 1, likewise in the mean. With both, the time is sought and the mass
    is the limit. One target serves both phases: what is met without dropping leaves the model unmodified.

    The policy's own strength is where it starts.

    `select` is pure between two calls of `begin` or `observe`. Ours, not the paper's: Algorithm 1 has a fixed theta.

    Raises ConfigError where the policy has no strength, where neither is given, or where one is impossible.
    """

    def __init__(self, policy: Policy, target_s: float | None = None, dropped_mass: float | None = None) -> None:
        if not isinstance(policy, SteerablePolicy):
            raise ConfigError(
                f"policy {policy.name}: it has no strength to steer; remove the target or take another policy, e.g. wlr"
            )
        _check(policy.name, target_s, dropped_mass)
        self.name, self._policy = policy.name, policy
        self._target_s, self._dropped_mass = target_s, dropped_mass
        self._steering: dict[int, _Steering] = {}
        self.params: Mapping[str, Any] = {
            **{key: value for key, value in policy.params.items() if key != policy.strength_name},
            **({} if target_s is None else {"target_ms": 1e3 * target_s}),
            **({} if dropped_mass is None else {"quality_budget": float(dropped_mass)}),
        }
        self.begin(0)

    def begin(self, phase: int) -> None:
        """The rounds from here on belong to this phase (0 prefill, 1 decode); its strength is as it was left."""
        self._now = self._of(phase)

    def select(self, routing: Routing, state: State) -> Selection:
        return self._policy.with_strength(self.strength).select(routing, state)

    def observe(self, phase: int, block_s: float, dropped_mass: float) -> None:
        """What a round came to: emulated seconds, and the share of the gate's weight that was not computed.

        A value that is not a finite number from 0 up says nothing and is passed over.
        """
        self._of(phase).observe(block_s, dropped_mass)

    @property
    def strength(self) -> float:
        """Of the phase that `begin` named, from 0 to the policy's `strongest`."""
        return float(self._policy.strongest * self._now.position**2)  # what is saved goes about with the root

    @property
    def saturated(self) -> bool:
        """target_s asks for more than the strongest setting, or than the quality budget allows, in this phase."""
        return self.saturated_rounds > 0

    @property
    def saturated_rounds(self) -> int:
        """For how many rounds in a row, up to the last one."""
        return self._now.saturated_rounds

    def _of(self, phase: int) -> _Steering:
        if phase not in self._steering:
            start, most = self._policy.params[self._policy.strength_name], self._policy.strongest
            position = math.sqrt(min(max(start / most, 0.0), 1.0))
            loops = _latency_loop(self._target_s, position), _mass_loop(self._dropped_mass, position)
            self._steering[phase] = _Steering(*loops)
        return self._steering[phase]


@dataclass(slots=True)
class _Loop:
    """Integral action on the log of a smoothed value over its goal. A position lies within 0 and 1."""

    goal: float
    gain: float
    least_position: float  # the step is in proportion to the position, but no smaller than at this one
    position: float
    smoothed: float = 1.0  # over the goal

    def observe(self, value: float, applied: float) -> None:
        """A value came of the position `applied`; one's own may not have run further ahead of that than SLACK."""
        if not (math.isfinite(value) and value >= 0):
            return
        counted = min(value / self.goal, OUTLIER * max(self.smoothed, 1.0))
        self.smoothed += SMOOTHING * (counted - self.smoothed)
        error = math.log(self.smoothed) if self.smoothed > 0 else LEAST_LOG
        position = min(self.position, applied + SLACK)
        step = self.gain * max(position, self.least_position) * min(max(error, LEAST_LOG), MOST_LOG)
        self.position = min(max(position + step, 0.0), 1.0)


@dataclass(slots=True)
class _Steering:
    """One phase: the lower of two positions is applied, and the other waits close above it."""

    latency: _Loop | None
    mass: _Loop | None
    saturated_rounds: int = 0

    @property
    def position(self) -> float:
        return min(loop.position for loop in (self.latency, self.mass) if loop is not None)

    def observe(self, block_s: float, dropped_mass: float) -> None:
        applied = self.position
        if self.mass is not None:
            self.mass.observe(dropped_mass, applied)
        if self.latency is not None:
            self.latency.observe(block_s, applied)
            most = 1.0 if self.mass is None else min(1.0, self.mass.position + SLACK)
            at_limit = self.latency.position > most - AT_LIMIT
            self.saturated_rounds = self.saturated_rounds + 1 if at_limit else 0


def _latency_loop(target_s: float | None, position: float) -> _Loop | None:
    return None if target_s is None else _Loop(target_s, LATENCY_GAIN, 1.0, position)


def _mass_loop(dropped_mass: float | None, position: float) -> _Loop | None:
    """The mass goes about with a power of the position, hence steps in proportion to that."""
    return None if dropped_mass is None else _Loop(dropped_mass, MASS_GAIN, LEAST_POSITION, position)


def _check(name: str, target_s: float | None, dropped_mass: float | None) -> None:
    if target_s is None and dropped_mass is None:
        raise ConfigError(f"policy {name}: to be steered it needs a target latency, a quality budget or both")
    if target_s is not None and not (_is_number(target_s) and 0 < target_s < math.inf):
        raise ConfigError(f"policy {name}: the target must be a block's time above 0 s, not {target_s!r}")
    if dropped_mass is not None and not (_is_number(dropped_mass) and 0 < dropped_mass <= 1):
        raise ConfigError(
            f"policy {name}: the quality budget is a share of gate mass above 0, at most 1, not {dropped_mass!r}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
