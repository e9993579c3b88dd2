"""Expert selection that looks at the load: only the device that the block waits for loses pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import types

from testbed.native import native, read, write
from testbed.policies.base import DROPPED, Routing, Selection, State
from testbed.policies.dropping import ROUNDING, Block, Floats, Ints, block_of, change_rows, queues_of, round_s
from testbed.policies.selection import finish
from testbed.policies.strength import Steerable, checked_share


class LoadAware(Steerable):
    """Drops the lightest pairs of the currently slowest device while a budget of gate mass lasts (ours, no paper's).

    Slowest is by State's cost of a round: base + experts touched * expert + rows * row, at the even split of the band.
    What is lightest, and what a budget is: `testbed.policies.dropping`. It ends when the budget is spent or the slowest
    device has nothing more to drop; then every pair comes back without which the block is no faster.
    Devices of unknown cost are neither waited for nor relieved.

    Raises ConfigError where budget is not a number from 0 to 1.
    """

    name = "load_aware"
    strength_name = "budget"

    def __init__(self, budget: float = 0.02) -> None:
        self.params: Mapping[str, Any] = {"budget": checked_share(self.name, "budget", budget)}

    def select(self, routing: Routing, state: State) -> Selection:
        return finish(routing, relieve_slowest(block_of(routing, state), self.params["budget"]))


def relieve_slowest(block: Block, budget: float) -> Ints:
    """device_TK once the slowest devices have lost what the budget, a share of the block's mass, allows."""
    if budget == 0:
        return block.device_TK
    limit = budget * block.total_mass * ROUNDING
    queues = queues_of(block, limit)
    device_TK, rows_NE = block.device_TK.copy(), block.rows_NE.copy()
    mass_P, expert_P = block.mass_TK.reshape(-1), block.expert_TK.reshape(-1)
    device_P = device_TK.reshape(-1)
    _relieve(queues.pair_Q, queues.begin_N1, mass_P, expert_P, limit, block.cost_s_NC, rows_NE, device_P)
    gone_P = np.flatnonzero(device_P != block.device_TK.reshape(-1))
    heaviest_first = gone_P[np.argsort(-mass_P[gone_P], kind="stable")]
    _restore(heaviest_first, block.device_TK.reshape(-1), expert_P, block.cost_s_NC, rows_NE, device_P)
    return device_TK


@native(
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.float64, 1),
    read(types.int64, 1),
    types.float64,
    read(types.float64, 2),
    write(types.int64, 2),
    write(types.int64, 1),
)
def _relieve(
    pair_Q: Ints,
    begin_N1: Ints,
    mass_P: Floats,
    expert_P: Ints,
    limit: float,
    cost_s_NC: Floats,
    rows_NE: Ints,
    device_P: Ints,
) -> int:
    rows_N, experts_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)
    time_s_N = np.array([round_s(device, cost_s_NC, rows_N, experts_N) for device in range(len(rows_N))])
    next_N = begin_N1.copy()
    while True:
        slowest = np.argmax(time_s_N)
        while next_N[slowest] < begin_N1[slowest + 1] and mass_P[pair_Q[next_N[slowest]]] > limit:
            next_N[slowest] += 1
        if next_N[slowest] == begin_N1[slowest + 1]:
            return 0
        pair = pair_Q[next_N[slowest]]
        next_N[slowest] += 1
        limit -= mass_P[pair]
        device_P[pair] = DROPPED
        change_rows(slowest, expert_P[pair], -1, rows_NE, rows_N, experts_N)
        time_s_N[slowest] = round_s(slowest, cost_s_NC, rows_N, experts_N)


@native(
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.float64, 2),
    write(types.int64, 2),
    write(types.int64, 1),
)
def _restore(
    gone_P: Ints,
    former_P: Ints,
    expert_P: Ints,
    cost_s_NC: Floats,
    rows_NE: Ints,
    device_P: Ints,
) -> int:
    rows_N, experts_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)
    block_s = 0.0
    for device in range(len(rows_N)):
        block_s = max(block_s, round_s(device, cost_s_NC, rows_N, experts_N))
    for pair in gone_P:
        device = former_P[pair]
        change_rows(device, expert_P[pair], 1, rows_NE, rows_N, experts_N)
        if round_s(device, cost_s_NC, rows_N, experts_N) <= block_s:
            device_P[pair] = device
        else:
            change_rows(device, expert_P[pair], -1, rows_NE, rows_N, experts_N)
    return 0
