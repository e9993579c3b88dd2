"""A policy of your own is one file like this one. In the run file: `name = "examples.my_policy:MinimumWeight"`."""

from __future__ import annotations

import numpy as np

from testbed.policies.base import DROPPED, Routing, Selection, State
from testbed.policies.selection import device_of_pair, finish


class MinimumWeight:
    """Drops an expert whose gate weight is less than `minimum` times that of the token's heaviest reachable expert."""

    name = "minimum_weight"

    def __init__(self, minimum: float = 0.2) -> None:
        self.params = {"minimum": minimum}

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = device_of_pair(routing, state)
        reachable_TK = np.where(device_TK == DROPPED, 0, routing.weight_TK)
        light_TK = reachable_TK < self.params["minimum"] * reachable_TK.max(axis=1, keepdims=True)
        return finish(routing, np.where(light_TK, DROPPED, device_TK))
