"""Blocks that policies are tried on: synthetic routing, synthetic costs and links."""

from __future__ import annotations

import math

import numpy as np

from testbed.policies.bandwidth import device_times_s
from testbed.policies.base import DROPPED, Air, IntArray, Routing, Selection, State


def random_case(seed: int, awkward: bool = False) -> tuple[Routing, State]:
    """A block of up to 12 tokens without ties. Awkward: ids of no expert, repeated ids, unknown costs, weights of 0."""
    rng = np.random.default_rng(seed)
    experts, devices = int(rng.integers(2, 9)), int(rng.integers(1, 6))
    tokens, k = int(rng.integers(0, 13)), int(rng.integers(2, min(experts, 4) + 1))
    score_TE = rng.dirichlet(np.ones(experts), tokens)
    expert_TK = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    weight_TK = np.take_along_axis(score_TE, expert_TK, axis=1)
    holds_NE = np.arange(devices)[:, None] == rng.integers(0, devices, experts)
    holds_NE |= rng.random((devices, experts)) < 0.2
    state = random_state(rng, devices)
    if awkward:
        expert_TK = np.where(
            rng.random(expert_TK.shape) < 0.2, rng.integers(-1, experts + 1, expert_TK.shape), expert_TK
        )
        weight_TK = np.where(rng.random(weight_TK.shape) < 0.1, 0.0, weight_TK)
        unknown_N = rng.random(devices) < 0.2
        for cost_s_N in (state.token_s_N, state.base_s_N, state.row_s_N):
            cost_s_N[unknown_N] = math.nan
        if state.air is not None:
            state.air.snr_hz_WN[:, rng.random(devices) < 0.2] = math.nan
        state.available_N[:] = rng.random(devices) < 0.8
    return Routing(3, expert_TK, weight_TK, holds_NE, score_TE), state


def random_state(rng: np.random.Generator, devices: int) -> State:
    """Links of a radio or of shaped rates, or nothing known of the air; experts that cost nothing to call, or much."""
    snr_hz_WN = 10 ** rng.uniform(6, 11, (2, devices)) if rng.random() < 0.7 else np.full((2, devices), math.inf)
    air_s_WN = 10 ** rng.uniform(-4, -2, (2, devices))
    base_s_N, expert_s_N = rng.uniform(0, 1e-2, (2, devices)) * (rng.random((2, 1)) < 0.5)
    row_s_N = air_s_WN.sum(axis=0) + 10 ** rng.uniform(-4, -2, devices)
    air = Air(100e6, snr_hz_WN, air_s_WN) if rng.random() < 0.6 else None
    token_s_N = base_s_N + expert_s_N + row_s_N
    return State(token_s_N, np.ones(devices, bool), np.zeros(devices), base_s_N, expert_s_N, row_s_N, air)


def load(routing: Routing, selection: Selection) -> tuple[IntArray, IntArray]:
    """Rows, and different experts, per device."""
    expert_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
    sent_TK = selection.device_TK != DROPPED
    rows_NE = np.zeros(routing.holds_NE.shape, int)
    np.add.at(rows_NE, (selection.device_TK[sent_TK], expert_TK[sent_TK]), 1)
    return rows_NE.sum(axis=1), np.count_nonzero(rows_NE, axis=1)


def predicted_s(routing: Routing, state: State, selection: Selection) -> float:
    """When the slowest device of known cost is done, under the selection's shares or else the even split.

    NaN where its share is not even and its link is not known.
    """
    rows_N, experts_N = load(routing, selection)
    known_N = np.isfinite(state.cost_s_N(rows_N, experts_N))
    times_s_N = device_times_s(rows_N, experts_N, state, selection.bandwidth_share_N)
    return float(times_s_N[known_N].max(initial=0.0))
