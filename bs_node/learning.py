"""What measured blocks teach: the clock of a node, and the estimate of its latency."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from time import monotonic_ns
from typing import Protocol

import numpy as np

from bs_node.blocks import Outcome
from bs_node.registry import Node
from bs_node.tables import table
from testbed.latency.clock_kernels import NOTHING, split_times
from testbed.latency.clock_sync import Clocks
from testbed.latency.lessons import Floats, Ints
from testbed.policies.base import BoolArray, FloatArray, State
from testbed.runlog.schema import Status

_STAMPS = attrgetter("bs_sent_ns", "node_received_ns", "node_sent_ns", "bs_received_ns")


class Estimates(Protocol):
    """What is known of every device's latency; times in seconds of the emulated world."""

    def teach_all(
        self,
        device_B: Ints,
        what_B4: Ints,
        seconds_B4: Floats,
        air_ratio_B2: Floats,
        now_s_B: Floats,
    ) -> Floats:
        """Learn from B blocks; predicted_s_B3 before that: compute, down, up."""

    def teach_at_least(
        self, device: int, rows: int, experts: int, seconds: float, now_s: float, air_ratio: Sequence[float]
    ) -> None: ...

    def forget(self, device: int) -> None:
        """The device is back as another process."""

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State: ...

    def air_row_s_WN(self) -> FloatArray:
        """Seconds of one row on the air at the even split; W: down, up."""


class Learning:
    """Turns outcomes into lessons, in seconds of the emulated world. Gives every node its clock, to compare them all
    in one pass."""

    def __init__(self, estimates: Estimates, nodes: Sequence[Node]) -> None:
        self.estimates, self._nodes = estimates, nodes
        self._boots = [node.boot_id for node in nodes]
        self._clocks = Clocks(len(nodes))
        for node, clock in zip(nodes, self._clocks.of_N, strict=True):
            node.clock = clock

    def answered(self, outcomes: Sequence[Outcome]) -> None:
        """Blocks whose replies are whole, in time or late: compare clocks, split times, teach. Fills the outcomes.

        Nothing is learnt from a block that was not on a wire.
        """
        sent, stamps = [], []
        for outcome in outcomes:
            if None not in (four := _STAMPS(outcome)):
                sent.append(outcome)
                stamps.append(four)
        if not sent:
            return
        stamps_B4 = table(stamps, np.int64)
        what_B4 = table([(o.block.rows, len(o.block.segments), o.bytes_down, o.bytes_up) for o in sent], np.int64)
        device_B = np.array([outcome.block.device for outcome in sent])
        real_ns_B = np.array([outcome.dilation * 1e9 for outcome in sent])  # of one emulated second
        air_ratio_B2 = table([outcome.air_ratio for outcome in sent], np.float64)
        ways_B4, seconds_B4 = self._clocks.exchanges(device_B, stamps_B4), np.empty(stamps_B4.shape)
        split_times(stamps_B4, ways_B4, real_ns_B, seconds_B4)
        predicted_s_B3 = self.estimates.teach_all(device_B, what_B4, seconds_B4, air_ratio_B2, stamps_B4[:, 3] / 1e9)
        for outcome, ways, predicted in zip(sent, ways_B4.tolist(), predicted_s_B3.tolist(), strict=True):
            outcome.predicted = predicted
            if ways[0] != NOTHING:
                outcome.down_ns, outcome.up_ns, outcome.clock_offset_ns, outcome.clock_bound_ns = ways

    def state(self, phase: int, available_N: BoolArray) -> State:
        """What is known now. A node that came back as another process is learnt anew, its old fit being a guess."""
        for device, node in enumerate(self._nodes):
            if node.boot_id != self._boots[device]:
                if self._boots[device] is not None:
                    self.estimates.forget(device)
                self._boots[device] = node.boot_id
        return self.estimates.state(phase, available_N, monotonic_ns() / 1e9)

    def missed(self, outcome: Outcome) -> None:
        """No reply by the deadline: the block takes at least as long as was waited for it."""
        if outcome.status is not Status.LATE or outcome.bs_sent_ns is None:
            return
        now_ns = monotonic_ns()
        waited_s = (now_ns - outcome.bs_sent_ns) / outcome.dilation / 1e9
        block = outcome.block
        self.estimates.teach_at_least(
            block.device, block.rows, len(block.segments), waited_s, now_ns / 1e9, outcome.air_ratio
        )
