"""Where several devices hold an expert: which of them computes a row. Nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import types

from testbed.errors import ConfigError
from testbed.native import native, read, write
from testbed.policies.base import DROPPED, BoolArray, Routing, Selection, State
from testbed.policies.dropping import Block, Floats, Ints, block_of, change_rows, round_s, slowest_s
from testbed.policies.selection import finish

METRICS = ("latency", "load")


class NearestReplica:
    """Sends each pair to one of the available devices that hold its expert; with one holder each it is `topk`.

    metric = "latency": to the one with the least token_s, whatever it has to do already.
    metric = "load": to the one that would be done first, counting the rows it was given so far and, at the even split,
    what one row more and perhaps one expert more cost; rows of one expert may go to several devices. Pairs that have no
    choice are placed first, then the heaviest. Where this greedy order predicts a slower block than "latency" does,
    that one's answer is taken. A device of unknown cost is asked only where no known one holds the expert.

    Raises ConfigError for any other metric.
    """

    name = "nearest_replica"

    def __init__(self, metric: str = "latency") -> None:
        if metric not in METRICS:
            raise ConfigError(f'policy nearest_replica: metric must be "latency" or "load", not {metric!r}')
        self.params: Mapping[str, Any] = {"metric": metric}

    def select(self, routing: Routing, state: State) -> Selection:
        block = block_of(routing, state)
        if self.params["metric"] == "latency":
            return finish(routing, block.device_TK)
        return finish(routing, _spread(routing, state, block))


def _spread(routing: Routing, state: State, block: Block) -> Ints:
    known_NE = routing.holds_NE & (state.available_N & block.known_N)[:, None]
    sent_P = np.flatnonzero(block.device_TK != DROPPED)
    expert_P, weight_P = block.expert_TK.reshape(-1), np.reshape(routing.weight_TK, -1)
    choices_P = known_NE.sum(axis=0)[expert_P[sent_P]]
    order = np.lexsort((-weight_P[sent_P], choices_P > 1))
    device_TK, rows_NE = block.device_TK.copy(), np.zeros_like(block.rows_NE)
    _assign(sent_P[order], expert_P, known_NE, block.cost_s_NC, rows_NE, device_TK.reshape(-1))
    return device_TK if slowest_s(block, rows_NE) <= slowest_s(block, block.rows_NE) else block.device_TK


@native(
    read(types.int64, 1),
    read(types.int64, 1),
    read(types.boolean, 2),
    read(types.float64, 2),
    write(types.int64, 2),
    write(types.int64, 1),
)
def _assign(
    pair_Q: Ints,
    expert_P: Ints,
    known_NE: BoolArray,
    cost_s_NC: Floats,
    rows_NE: Ints,
    device_P: Ints,
) -> int:
    rows_N, experts_N = rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)
    for pair in pair_Q:
        expert, least_s = expert_P[pair], np.inf
        for device in range(len(rows_N)):
            if known_NE[device, expert]:
                change_rows(device, expert, 1, rows_NE, rows_N, experts_N)
                time_s = round_s(device, cost_s_NC, rows_N, experts_N)
                change_rows(device, expert, -1, rows_NE, rows_N, experts_N)
                if time_s < least_s:
                    device_P[pair], least_s = device, time_s
        change_rows(device_P[pair], expert, 1, rows_NE, rows_N, experts_N)
    return 0
