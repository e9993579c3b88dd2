"""All the gate's experts are asked, and those that answer late are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, Deadline, Routing, Selection, State
from testbed.policies.selection import device_of_pair, surviving_weights


class DropLate:
    """The baseline: nothing is predicted. A round ends `after_s` after every token has had `k_min` answers.

    As hivemind's mixture of experts does (k_min, timeout_after_k_min). The latency of a round is that of the k_min-th
    answer of the worst token plus `after_s`; what is dropped depends on who was late, not on what the pair weighs.

    Raises ConfigError where k_min is not a whole number above 0 or after_s not a number from 0 up.
    """

    name = "drop_late"

    def __init__(self, k_min: int = 1, after_s: float = 0.01) -> None:
        if isinstance(k_min, bool) or not isinstance(k_min, int) or k_min < 1:
            raise ConfigError(f"policy drop_late: k_min must be a whole number above 0, not {k_min!r}")
        if isinstance(after_s, bool) or not isinstance(after_s, (int, float)) or not 0 <= after_s < 1e6:
            raise ConfigError(f"policy drop_late: after_s must be seconds from 0 up, not {after_s!r}")
        self.params: Mapping[str, Any] = {"k_min": k_min, "after_s": float(after_s)}

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = device_of_pair(routing, state)
        weight_TK = surviving_weights(routing, device_TK != DROPPED)
        return Selection(device_TK, weight_TK, deadline=Deadline(self.params["k_min"], self.params["after_s"]))
