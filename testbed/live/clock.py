"""Time as users of an emulated testbed would see it: rounds undilated, the base station's own compute as it is."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from bs_node.model import experts_of
from bs_node.session import Session

BLOCKS_KEPT = 65_536


class LiveClock:
    """Seconds, of real time where nothing is dilated. Listens to the experts modules of the base station's model."""

    def __init__(self, model: Any, session: Session) -> None:
        self.block_s: deque[float] = deque(maxlen=BLOCKS_KEPT)  # each block's time: select, exchange, combine
        self._session = session
        self._saved_s = 0.0  # what dilation added so far
        self._began_s = 0.0
        for experts in experts_of(model).values():
            experts.register_forward_pre_hook(self._begin)
            experts.register_forward_hook(self._end)

    def now_s(self) -> float:
        return time.monotonic() - self._saved_s

    def _begin(self, *_: object) -> None:
        self._began_s = time.monotonic()

    def _end(self, *_: object) -> None:
        real_s = time.monotonic() - self._began_s
        block_s = real_s / self._session.dispatcher.dilation
        self.block_s.append(block_s)
        self._saved_s += real_s - block_s
