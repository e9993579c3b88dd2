"""Instead of waiting for the slowest device, ask the gate's next choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numba import types

from testbed.errors import ConfigError
from testbed.native import inlined, native, read, write
from testbed.policies.base import DROPPED, BoolArray, Routing, Selection, State
from testbed.policies.dropping import (
    ROUNDING,
    Block,
    Floats,
    Ints,
    block_of,
    change_rows,
    queues_of,
    round_s,
    slowest_s,
)
from testbed.policies.selection import device_of_pair, finish, surviving_weights
from testbed.policies.strength import Steerable, checked_share


class Substitute(Steerable):
    """Gives the lightest pairs of the currently slowest device to the token's next-best expert (ours, no paper's).

    Next-best is by the gate's own scores, among the experts that the token has not, held by an available device of
    known cost that would be done, with this row, before the slowest device is; its score must be at least min_ratio of
    the replaced one. What is spent of the budget, a share of the block's gate mass, is the mass of the replaced pairs.
    It ends when the budget is spent or the slowest device has no pair that another could take; a substitution without
    which the block is no slower is taken back. A substitute weighs its score, and the token keeps the gate's sum.

    Raises ConfigError where budget or min_ratio is not a number from 0 to 1, and `select` where the gate gives no
    scores for the experts it did not choose.
    """

    name = "substitute"
    strength_name = "budget"

    def __init__(self, budget: float = 0.05, min_ratio: float = 0.5) -> None:
        self.params: Mapping[str, Any] = {
            "budget": checked_share(self.name, "budget", budget),
            "min_ratio": checked_share(self.name, "min_ratio", min_ratio),
        }

    def select(self, routing: Routing, state: State) -> Selection:
        if routing.score_TE is None:
            raise ConfigError(
                f"policy substitute: the gate of layer {routing.layer} does not tell its score of the experts it did "
                "not choose; take a model whose gate does (a softmax or sigmoid over all experts), or another policy"
            )
        score_TE = np.ascontiguousarray(routing.score_TE, np.float64)
        block = block_of(routing, state)
        device_TK, expert_TK = self._substituted(block, score_TE, _holder_of_expert(routing, state, block))
        if np.array_equal(expert_TK, block.expert_TK):
            return finish(routing, block.device_TK)
        weight_TK = _weights(routing, score_TE, expert_TK, device_TK != DROPPED)
        return Selection(device_TK, weight_TK, expert_TK=expert_TK)

    def _substituted(self, block: Block, score_TE: Floats, holder_E: Ints) -> tuple[Ints, Ints]:
        limit = self.params["budget"] * block.total_mass * ROUNDING
        sent_TK = block.device_TK != DROPPED
        queues = queues_of(replace(block, droppable_TK=sent_TK & block.known_N[block.device_TK]), limit)
        device_TK, expert_TK, rows_NE = block.device_TK.copy(), block.expert_TK.copy(), block.rows_NE.copy()
        if limit > 0:
            _substitute(
                queues.pair_Q,
                queues.begin_N1,
                block.mass_TK,
                limit,
                block.expert_TK,
                score_TE,
                holder_E,
                self.params["min_ratio"],
                block.cost_s_NC,
                rows_NE,
                device_TK,
                expert_TK,
            )
        moved_P = np.flatnonzero(expert_TK != block.expert_TK)
        heaviest_first = moved_P[np.argsort(-block.mass_TK.reshape(-1)[moved_P], kind="stable")]
        _take_back(heaviest_first, block.device_TK, block.expert_TK, block.cost_s_NC, rows_NE, device_TK, expert_TK)
        if slowest_s(block, rows_NE) < slowest_s(block, block.rows_NE):
            return device_TK, expert_TK
        return block.device_TK, block.expert_TK


def _holder_of_expert(routing: Routing, state: State, block: Block) -> Ints:
    """holder_E: which device would compute an expert; DROPPED where none is there, or its cost is unknown."""
    every_expert = replace(routing, expert_TK=np.arange(routing.holds_NE.shape[1])[None])
    holder_E = device_of_pair(every_expert, state)[0]
    return np.where(block.known_N[holder_E], holder_E, DROPPED)


def _weights(routing: Routing, score_TE: Floats, expert_TK: Ints, sent_TK: BoolArray) -> Floats:
    new_TK = expert_TK != routing.expert_TK
    token, choice = np.nonzero(new_TK)
    weight_TK = np.where(sent_TK, routing.weight_TK, 0).astype(np.float64)
    weight_TK[token, choice] = score_TE[token, expert_TK[token, choice]]
    kept_TK = surviving_weights(routing, sent_TK)
    scale_T1 = kept_TK.sum(axis=1, keepdims=True, dtype=np.float64) / weight_TK.sum(axis=1, keepdims=True).clip(1e-300)
    return np.where(new_TK.any(axis=1, keepdims=True), weight_TK * scale_T1, kept_TK).astype(routing.weight_TK.dtype)


@inlined
def _has(expert_K: Ints, expert: int) -> bool:
    return bool(np.any(expert_K == expert))


@native(
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.float64, 2),
    types.float64,
    read(types.int64, 2),
    read(types.float64, 2),
    read(types.int64, 1),
    types.float64,
    read(types.float64, 2),
    write(types.int64, 2),
    write(types.int64, 2),
    write(types.int64, 2),
)
def _substitute(
    pair_Q: Ints,
    begin_N1: Ints,
    mass_TK: Floats,
    limit: float,
    gate_TK: Ints,
    score_TE: Floats,
    holder_E: Ints,
    min_ratio: float,
    cost_s_NC: Floats,
    rows_NE: Ints,
    device_TK: Ints,
    expert_TK: Ints,
) -> int:
    rows_N, experts_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)
    time_s_N = np.array([round_s(device, cost_s_NC, rows_N, experts_N) for device in range(len(rows_N))])
    next_N = begin_N1.copy()
    while True:
        slowest = np.argmax(time_s_N)
        if next_N[slowest] == begin_N1[slowest + 1]:
            return 0
        token, choice = divmod(pair_Q[next_N[slowest]], expert_TK.shape[1])
        next_N[slowest] += 1
        expert, mass = expert_TK[token, choice], mass_TK[token, choice]
        if mass > limit:
            continue
        best, best_score = -1, 0.0
        for other in range(len(holder_E)):
            score, holder = score_TE[token, other], holder_E[other]
            good = score > best_score and score >= min_ratio * score_TE[token, expert]
            if (
                good
                and holder >= 0
                and holder != slowest
                and not (_has(gate_TK[token], other) or _has(expert_TK[token], other))
            ):
                change_rows(holder, other, 1, rows_NE, rows_N, experts_N)
                if round_s(holder, cost_s_NC, rows_N, experts_N) < time_s_N[slowest]:
                    best, best_score = other, score
                change_rows(holder, other, -1, rows_NE, rows_N, experts_N)
        if best < 0:
            continue
        limit -= mass
        expert_TK[token, choice], device_TK[token, choice] = best, holder_E[best]
        change_rows(slowest, expert, -1, rows_NE, rows_N, experts_N)
        change_rows(holder_E[best], best, 1, rows_NE, rows_N, experts_N)
        for device in (slowest, holder_E[best]):
            time_s_N[device] = round_s(device, cost_s_NC, rows_N, experts_N)


@native(
    read(types.int64, 1),
    read(types.int64, 2),
    read(types.int64, 2),
    read(types.float64, 2),
    write(types.int64, 2),
    write(types.int64, 2),
    write(types.int64, 2),
)
def _take_back(
    moved_P: Ints,
    former_TK: Ints,
    gate_TK: Ints,
    cost_s_NC: Floats,
    rows_NE: Ints,
    device_TK: Ints,
    expert_TK: Ints,
) -> int:
    rows_N, experts_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)
    block_s = 0.0
    for device in range(len(rows_N)):
        block_s = max(block_s, round_s(device, cost_s_NC, rows_N, experts_N))
    for pair in moved_P:
        token, choice = divmod(pair, gate_TK.shape[1])
        former, expert = former_TK[token, choice], gate_TK[token, choice]
        change_rows(former, expert, 1, rows_NE, rows_N, experts_N)
        if round_s(former, cost_s_NC, rows_N, experts_N) > block_s:
            change_rows(former, expert, -1, rows_NE, rows_N, experts_N)
            continue
        change_rows(device_TK[token, choice], expert_TK[token, choice], -1, rows_NE, rows_N, experts_N)
        device_TK[token, choice], expert_TK[token, choice] = former, expert
    return 0
