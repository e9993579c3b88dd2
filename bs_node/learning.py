"""What measured blocks teach: the clock of a node, and the estimate of its latency."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns
from typing import Protocol

from bs_node.blocks import Outcome
from bs_node.registry import Node
from testbed.latency.estimator import Lesson, Prediction
from testbed.policies.base import BoolArray, State
from testbed.runlog.schema import Status


class Estimates(Protocol):
    """What is known of every device's latency; times in seconds of the emulated world."""

    def teach(self, device: int, lesson: Lesson, now_s: float) -> None: ...

    def teach_at_least(self, device: int, rows: int, experts: int, seconds: float, now_s: float) -> None: ...

    def predict(self, device: int, rows: int, experts: int, bytes_down: int, bytes_up: int) -> Prediction: ...

    def forget(self, device: int) -> None:
        """The device is back as another process."""

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State: ...


class Learning:
    """Turns outcomes into lessons, in seconds of the emulated world."""

    def __init__(self, estimates: Estimates, nodes: Sequence[Node]) -> None:
        self.estimates, self._nodes = estimates, nodes
        self._boots = [node.boot_id for node in nodes]

    def answered(self, outcome: Outcome) -> None:
        """A block's reply is whole, in time or late: compare the clocks, split its time, teach. Fills the outcome."""
        stamps = outcome.stamps
        if stamps is None:
            return
        bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns = stamps
        residence_ns, rtt_ns = node_sent_ns - node_received_ns, bs_received_ns - bs_sent_ns
        clock = self._nodes[outcome.block.device].clock
        clock.exchange(*stamps)
        link_ns = max(rtt_ns - residence_ns, 1)
        real_ns = outcome.dilation * 1e9  # of one emulated second
        lesson = Lesson(
            outcome.block.rows, len(outcome.block.segments), outcome.bytes_down, outcome.bytes_up,
            compute_s=residence_ns / real_ns, link_s=link_ns / real_ns,
        )  # fmt: skip
        ways = clock.one_way_times(*stamps)
        if ways is not None:
            shrink = min(1.0, link_ns / max(ways.down_ns + ways.up_ns, 1))  # together no more than the link took
            outcome.down_ns, outcome.up_ns = int(ways.down_ns * shrink), int(ways.up_ns * shrink)
            outcome.clock_offset_ns, outcome.clock_bound_ns = ways.offset_ns, ways.bound_ns
            lesson = lesson._replace(down_s=outcome.down_ns / real_ns, up_s=outcome.up_ns / real_ns)
        outcome.predicted = self.estimates.predict(outcome.block.device, *lesson[:4])
        self.estimates.teach(outcome.block.device, lesson, bs_received_ns / 1e9)

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
        self.estimates.teach_at_least(block.device, block.rows, len(block.segments), waited_s, now_ns / 1e9)
