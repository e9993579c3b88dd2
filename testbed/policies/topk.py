"""The unmodified model: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.policies.base import Routing, Selection, State
from testbed.policies.selection import device_of_pair, finish


class TopK:
    """Keeps every pair whose expert has an available device."""

    name = "topk"

    def __init__(self) -> None:
        self.params: Mapping[str, Any] = {}

    def select(self, routing: Routing, state: State) -> Selection:
        return finish(routing, device_of_pair(routing, state))
