"""What dispatch is: having the experts of one round computed. In this process here, over the air in `wireless.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bs_node.blocks import Block, Float32, Outcome, PlainRows
from bs_node.round import EarlyEnd
from testbed.policies.base import FloatArray
from testbed.runlog.schema import Status
from testbed.wire.quantization import Scheme


class Watcher(NamedTuple):
    """Whom an exchange tells how it goes, and who may use the time."""

    sent: Callable[[], None]  # all that fits has been sent: the nodes work now
    answered: Callable[[Outcome], None]  # a block's reply is whole


NOBODY = Watcher(sent=lambda: None, answered=lambda _: None)


@dataclass(slots=True)
class ExchangeTimes:
    """Where the base station's time went in an exchange, in nanoseconds."""

    quantise_ns: int = 0
    send_ns: int = 0
    wait_ns: int = 0
    dequantise_ns: int = 0


class RowsElsewhere(Protocol):
    """hidden_TD that is not in this memory: on a GPU. What travels of it is made there."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, token_R: NDArray[np.int64]) -> Float32: ...
    def quantise(self, scheme: Scheme, padded_width: int = 0) -> NDArray[np.uint8]: ...


Hidden = Float32 | RowsElsewhere


class Dispatcher(Protocol):
    """Computes blocks of rows on devices."""

    dilation: float  # by how much emulated time is stretched now
    air_ratio_WN: FloatArray | None  # how many times the even split's rate links have now; None: all 1

    def refresh(self) -> None:
        """Learn who is there, before a policy chooses among them."""
        ...

    def collect_late(self) -> list[Outcome]:
        """Blocks of earlier rounds, and probes, whose replies have come since the last call."""
        ...

    def probe(self, device: int, layer: int, expert: int, width: int) -> None:
        """Have one row computed without waiting for it."""
        ...

    def exchange(
        self,
        number: int,
        layer: int,
        hidden_TD: Hidden,
        blocks: Sequence[Block],
        watcher: Watcher = NOBODY,
        early_end: EarlyEnd | None = None,
    ) -> tuple[list[Outcome], ExchangeTimes]:
        """What became of each block."""
        ...


class LocalExperts(Protocol):
    """The part of a node's experts that the in-process dispatcher needs."""

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Float32) -> Float32: ...


class InProcessDispatcher:
    """Every device's experts in this process, no wire: what the wireless dispatcher must equal."""

    dilation = 1.0
    air_ratio_WN: FloatArray | None = None

    def __init__(self, experts_of_device: Sequence[LocalExperts]) -> None:
        self._experts = experts_of_device

    def refresh(self) -> None:
        """Everyone is always there."""

    def collect_late(self) -> list[Outcome]:
        return []  # nobody is ever late

    def probe(self, device: int, layer: int, expert: int, width: int) -> None:
        """There is no link to measure."""

    def exchange(
        self,
        number: int,  # noqa: ARG002 - only the wire needs it
        layer: int,
        hidden_TD: Hidden,
        blocks: Sequence[Block],
        watcher: Watcher = NOBODY,
        early_end: EarlyEnd | None = None,  # noqa: ARG002 - all have answered by then
    ) -> tuple[list[Outcome], ExchangeTimes]:
        outcomes = []
        watcher.sent()
        for block in blocks:
            output_RD = self._experts[block.device].compute(layer, block.segments, hidden_TD[block.token_R])
            outcomes.append(Outcome(block, Status.ANSWERED, PlainRows(output_RD)))
            watcher.answered(outcomes[-1])
        return outcomes, ExchangeTimes()
