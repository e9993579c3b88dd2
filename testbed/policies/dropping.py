"""What policies that drop pairs within a budget share: what a pair is worth, and which one a device loses first.

Mass is the unit of a budget. A pair's mass is its weight over the sum of its token's weights, so that each token counts
1, and a budget is a share of the block's: budget 0.02 of 512 tokens is a mass of 10.24. One without weight counts 0.
Pairs that are lost because nobody available holds their expert are not paid for. A token's heaviest available pair is
never dropped: pairs can then be dropped in any order and no token is orphaned.

P pairs in the order of a flattened TK array, Q those that may be dropped, grouped by device. C what a round costs a
device: base, per expert touched, per row, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import inlined, native, read, write
from testbed.policies.base import DROPPED, BoolArray, FloatArray, Routing, Selection, State
from testbed.policies.selection import device_of_pair, routed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDING = 1 + 1e-12  # a sum of masses may exceed a limit by that much


@dataclass(frozen=True, slots=True)
class Block:
    """What the unmodified model would compute of one MoE block, what it costs, and the mass of each pair."""

    device_TK: Ints
    expert_TK: Ints
    mass_TK: Floats  # 0 where there is no expert
    droppable_TK: BoolArray  # sent, not the token's heaviest, and the cost of its device is known
    rows_NE: Ints
    cost_s_NC: Floats  # at the even split; zeros where unknown: such a device is never the slowest
    known_N: BoolArray
    total_mass: float  # tokens with any weight

    @property
    def experts_N(self) -> Ints:
        """How many different experts each device computes."""
        touched_N: Ints = np.count_nonzero(self.rows_NE, axis=1)
        return touched_N


@dataclass(frozen=True, slots=True)
class Queues:
    """Droppable pairs, those of device n from begin_N1[n] on, those that save most seconds per mass first."""

    pair_Q: Ints
    begin_N1: Ints
    price_Q: Floats  # mass per second saved


def block_of(routing: Routing, state: State) -> Block:
    """The block as `topk` would send it, each expert on the device that `device_of_pair` names."""
    device_TK = np.ascontiguousarray(device_of_pair(routing, state), np.int64)
    expert_TK = np.ascontiguousarray(routing.expert_TK, np.int64)
    cost_s_NC = np.stack([state.base_s_N, state.expert_s_N, state.row_s_N], axis=1).astype(np.float64)
    known_N = np.logical_and.reduce(np.isfinite(cost_s_NC), axis=1)
    cost_s_NC[~known_N] = 0
    mass_TK, total_mass = _mass(routing)
    droppable_TK = np.empty(device_TK.shape, np.bool_)
    rows_NE = np.zeros(routing.holds_NE.shape, np.int64)
    _count(device_TK, expert_TK, mass_TK, known_N, droppable_TK, rows_NE)
    return Block(device_TK, expert_TK, mass_TK, droppable_TK, rows_NE, cost_s_NC, known_N, total_mass)


def _mass(routing: Routing) -> tuple[Floats, float]:
    weight_TK = np.where(routed(routing), routing.weight_TK, 0).astype(np.float64)
    total_T1 = weight_TK.sum(axis=1, keepdims=True)
    counts_T1 = np.isfinite(total_T1) & (total_T1 > 0)
    mass_TK = np.divide(weight_TK, total_T1, out=np.zeros_like(weight_TK), where=counts_T1)
    return mass_TK, float(counts_T1.sum())


@native(
    read(types.int64, 2),
    read(types.int64, 2),
    read(types.float64, 2),
    read(types.boolean, 1),
    write(types.boolean, 2),
    write(types.int64, 2),
)
def _count(
    device_TK: Ints,
    expert_TK: Ints,
    mass_TK: Floats,
    known_N: BoolArray,
    droppable_TK: BoolArray,
    rows_NE: Ints,
) -> int:
    for token in range(device_TK.shape[0]):
        heaviest, most = -1, 0.0  # without any mass nothing is dropped: there would be no weight to keep
        for choice in range(device_TK.shape[1]):
            if device_TK[token, choice] != DROPPED:
                rows_NE[device_TK[token, choice], expert_TK[token, choice]] += 1
                if mass_TK[token, choice] > most:
                    heaviest, most = choice, mass_TK[token, choice]
        for choice in range(device_TK.shape[1]):
            device = device_TK[token, choice]
            free = heaviest >= 0 and choice != heaviest and device != DROPPED
            droppable_TK[token, choice] = free and known_N[device] and mass_TK[token, choice] >= 0
    return 0


def queues_of(block: Block, limit: float) -> Queues:
    """In which order each device would lose its pairs, at the even split of the band.

    A dropped row saves the time of a row. It saves that of calling its expert as well only if no row of the expert is
    left, which in decode is nearly all there is to save. So a pair's price is the lower of its own mass per second and
    of that of its whole expert where all of this may be dropped within `limit`; its pairs then stand together.
    """
    pair_Q = np.flatnonzero(block.droppable_TK)
    device_Q, mass_Q = block.device_TK.ravel()[pair_Q], block.mass_TK.ravel()[pair_Q]
    whole_Q = _price_of_whole_experts(block, limit)[device_Q, block.expert_TK.ravel()[pair_Q]]
    with np.errstate(divide="ignore", invalid="ignore"):
        price_Q = np.fmin(mass_Q / block.cost_s_NC[device_Q, 2], whole_Q)
    order = np.lexsort((mass_Q, price_Q, device_Q))
    order = order[price_Q[order] < np.inf]
    begin_N1 = np.searchsorted(device_Q[order], np.arange(len(block.rows_NE) + 1))
    return Queues(pair_Q[order], begin_N1, price_Q[order])


def _price_of_whole_experts(block: Block, limit: float) -> FloatArray:
    devices, experts = block.rows_NE.shape
    place_P = (block.device_TK * experts + block.expert_TK)[block.droppable_TK]
    free_NE = np.bincount(place_P, minlength=devices * experts).reshape(devices, experts)
    mass_NE = np.bincount(place_P, block.mass_TK[block.droppable_TK], devices * experts).reshape(devices, experts)
    base_s_N1, expert_s_N1, row_s_N1 = block.cost_s_NC.T[:, :, None]
    saved_s_NE = expert_s_N1 + block.rows_NE * row_s_N1 + (block.experts_N == 1)[:, None] * base_s_N1
    with np.errstate(divide="ignore", invalid="ignore"):
        price_NE: FloatArray = mass_NE / saved_s_NE
    return np.where((free_NE == block.rows_NE) & (mass_NE <= limit), price_NE, np.inf)


def dropped_mass(routing: Routing, state: State, selection: Selection) -> float:
    """The share of the block's gate mass, 0 to 1, of what `topk` would have sent and the selection does not."""
    block = block_of(routing, state)
    gone_TK = (block.device_TK != DROPPED) & (selection.device_TK == DROPPED)
    return float(block.mass_TK[gone_TK].sum() / max(block.total_mass, 1.0))


def slowest_s(block: Block, rows_NE: Ints) -> float:
    """Predicted seconds, at the even split, of the block if device n computes rows_NE[n, e] rows of expert e."""
    base_s_N, expert_s_N, row_s_N = block.cost_s_NC.T
    rows_N = rows_NE.sum(axis=1)
    time_s_N = base_s_N + (rows_NE > 0).sum(axis=1) * expert_s_N + rows_N * row_s_N
    return float(time_s_N[rows_N > 0].max(initial=0.0))


@inlined
def change_rows(device: Any, expert: Any, change: int, rows_NE: Any, rows_N: Any, experts_N: Any) -> None:
    """For loops in numba: give a device a row of an expert, or take one (-1), and keep its counts."""
    experts_N[device] -= rows_NE[device, expert] > 0
    rows_NE[device, expert] += change
    rows_N[device] += change
    experts_N[device] += rows_NE[device, expert] > 0


@inlined
def round_s(device: Any, cost_s_NC: Floats, rows_N: Any, experts_N: Any) -> float:
    """For loops in numba: State.cost_s_N of one device."""
    if rows_N[device] == 0:
        return 0.0
    base_s, expert_s, row_s = cost_s_NC[device]
    seconds: float = base_s + experts_N[device] * expert_s + rows_N[device] * row_s
    return seconds
