"""Which pairs are dropped and how the band is shared, decided together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write
from testbed.policies.bandwidth import block_shares
from testbed.policies.base import DROPPED, Air, Routing, Selection, State
from testbed.policies.dropping import ROUNDING, Block, Floats, Ints, block_of, change_rows, queues_of
from testbed.policies.links import LINKS, Links, air_and_slope_s, allocated_s, links_of, work_s
from testbed.policies.load_aware import relieve_slowest
from testbed.policies.selection import finish
from testbed.policies.strength import Steerable, checked_share

STEPS = 24  # a budget is spent in so many; after each the band is shared out anew
BOUND = 1 - 1e-9  # a time that is that part of the block's decides it


class Joint(Steerable):
    """Drops pairs and shares out the band in turn, so that a block at its best shares is as fast as a budget allows.

    Our formulation; the journal's algorithm is not published. At the best shares all devices take equally long, tau,
    so a row less on any of them frees band for all. By the implicit function theorem on "the shares sum to 1", saving s
    seconds on device n lowers tau by s b_n / (sum of b), b_n being the share that a second more would free there. Pairs
    are dropped by that over their mass, a small part of the budget at a time, then the band is shared out again. A step
    counts only if the block is then faster; one that is not is tried once more with a single pair. Mass, budget and
    which pair a device would lose first are those of `testbed.policies.dropping`, at the even split: no ratio of a
    weight to an allocated rate is used. Such ratios run away: who has few rows gets little band, and so loses them.

    Where State.air is None there is no band to share: it is `load_aware`, without shares.
    Raises ConfigError where budget is not a number from 0 to 1.
    """

    name = "joint"
    strength_name = "budget"

    def __init__(self, budget: float = 0.02) -> None:
        self.params: Mapping[str, Any] = {"budget": checked_share(self.name, "budget", budget)}

    def select(self, routing: Routing, state: State) -> Selection:
        block, budget = block_of(routing, state), self.params["budget"]
        if state.air is None:
            return finish(routing, relieve_slowest(block, budget))
        device_TK = _dropped_jointly(block, state.air, budget) if budget > 0 else block.device_TK
        return with_best_shares(routing, state, device_TK)


def with_best_shares(routing: Routing, state: State, device_TK: Ints) -> Selection:
    """What `finish` answers, and the shares under which the block is fastest where there is a band to share out."""
    selection = finish(routing, device_TK)
    if state.air is None:
        return selection
    rows_NE = np.zeros(routing.holds_NE.shape, np.int64)
    sent_TK = device_TK != DROPPED
    np.add.at(rows_NE, (device_TK[sent_TK], routing.expert_TK[sent_TK]), 1)
    share_N, _ = block_shares(rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1), state)
    return Selection(selection.device_TK, selection.weight_TK, bandwidth_share_N=share_N)


def _dropped_jointly(block: Block, air: Air, budget: float) -> Ints:
    limit = budget * block.total_mass * ROUNDING
    queues = queues_of(block, limit)
    device_TK = block.device_TK.copy()
    _spend(
        *links_of(block, air),
        queues.pair_Q,
        queues.begin_N1,
        queues.price_Q,
        block.mass_TK.reshape(-1),
        block.expert_TK.reshape(-1),
        block.cost_s_NC[:, 2].copy(),
        limit,
        block.rows_NE.copy(),
        device_TK.reshape(-1),
    )
    return device_TK


@inlined
def _worth(
    links: Links,
    even_row_s_N: Floats,
    rows_N: Ints,
    experts_N: Ints,
    share_N: Floats,
    block_s: float,
) -> Floats:
    """Band that a device frees per second, counted at the even split, of what is taken from it.

    Where a device that no band makes faster decides the block's time, only that one is worth anything.
    """
    worth_N, shares = np.zeros(len(rows_N)), links.row_bits_WN[0] * rows_N > 0
    for device in range(len(rows_N)):
        alone_s = work_s(links, device, rows_N[device], experts_N[device])
        worth_N[device] = not shares[device] and rows_N[device] > 0 and alone_s >= BOUND * block_s
    if worth_N.any():
        return worth_N
    for device in range(len(rows_N)):
        if shares[device] and even_row_s_N[device] > 0:
            air_s, slope_s = air_and_slope_s(links, device, rows_N[device], share_N[device])
            row_s = links.work_s_NC[device, 2] + air_s / rows_N[device]
            worth_N[device] = share_N[device] / slope_s * row_s / even_row_s_N[device]
    return worth_N


@inlined
def _take_batch(
    worth_N: Floats,
    step: float,
    limit: float,
    pair_Q: Ints,
    begin_N1: Ints,
    price_Q: Floats,
    mass_P: Floats,
    next_N: Ints,
    batch_Q: Ints,
) -> tuple[int, float]:
    """Pairs of most worth per mass, at least one, until they weigh `step`, as many as fit into the limit."""
    taken, spent = 0, 0.0
    while taken == 0 or spent < step:
        best, most = -1, 0.0
        for device in range(len(worth_N)):
            while next_N[device] < begin_N1[device + 1] and mass_P[pair_Q[next_N[device]]] > limit - spent:
                next_N[device] += 1
            if next_N[device] < begin_N1[device + 1] and worth_N[device] > 0:
                price = price_Q[next_N[device]]
                gain = worth_N[device] / price if price > 0 else np.inf
                if gain > most:
                    best, most = device, gain
        if best < 0:
            break
        batch_Q[taken] = pair_Q[next_N[best]]
        spent += mass_P[batch_Q[taken]]
        next_N[best] += 1
        taken += 1
    return taken, spent


@native(
    *LINKS,
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.float64, 1),
    read(types.float64, 1),
    read(types.int64, 1),
    read(types.float64, 1),
    types.float64,
    write(types.int64, 2),
    write(types.int64, 1),
)
def _spend(
    work_s_NC: Floats,
    row_bits_WN: Floats,
    snr_hz_WN: Floats,
    bandwidth_hz: float,
    pair_Q: Ints,
    begin_N1: Ints,
    price_Q: Floats,
    mass_P: Floats,
    expert_P: Ints,
    even_row_s_N: Floats,
    limit: float,
    rows_NE: Ints,
    device_P: Ints,
) -> int:
    links = Links(work_s_NC, row_bits_WN, snr_hz_WN, bandwidth_hz)
    rows_N, experts_N, share_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1), np.zeros(len(rows_NE))
    block_s = allocated_s(links, rows_N, experts_N, share_N)
    batch_Q, step, next_N = np.empty(len(pair_Q), np.int64), limit / STEPS, begin_N1.copy()
    while True:
        worth_N = _worth(links, even_row_s_N, rows_N, experts_N, share_N, block_s)
        former_next_N, former_share_N, former_P = next_N.copy(), share_N.copy(), device_P[pair_Q]
        taken, spent = _take_batch(worth_N, step, limit, pair_Q, begin_N1, price_Q, mass_P, next_N, batch_Q)
        if taken == 0:
            return 0
        for pair in batch_Q[:taken]:
            change_rows(device_P[pair], expert_P[pair], -1, rows_NE, rows_N, experts_N)
            device_P[pair] = DROPPED
        faster_s = allocated_s(links, rows_N, experts_N, share_N)
        if faster_s < block_s:
            block_s, limit = faster_s, limit - spent
            continue
        for index, pair in enumerate(pair_Q):
            if device_P[pair] != former_P[index]:
                device_P[pair] = former_P[index]
                change_rows(device_P[pair], expert_P[pair], 1, rows_NE, rows_N, experts_N)
        next_N, share_N = former_next_N, former_share_N
        if taken == 1:
            return 0
        step = 0.0
