"""Dispatch of one round: over the air, or in this process. The latter is the specification of the former."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bs_node.blocks import Block, Float32, Outcome
from bs_node.round import Round, Transfer
from bs_node.station import Mail, Station
from testbed.errors import MessageError
from testbed.runlog.schema import Status
from testbed.wire.kept import KeptRows
from testbed.wire.messages import RequestPart
from testbed.wire.parts import part_count
from testbed.wire.quantization import SCHEMES, SchemeName, quantise

FULL_QUEUE_RETRY_MS = 1
LIVENESS_CHECK_MS = 20


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


class Dispatcher(Protocol):
    """Computes blocks of rows on devices."""

    def refresh(self) -> None:
        """Learn who is there, before a policy chooses among them."""
        ...

    def exchange(
        self, number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block], watcher: Watcher = NOBODY
    ) -> tuple[list[Outcome], ExchangeTimes]:
        """What became of each block."""
        ...


class LocalExperts(Protocol):
    """The part of a node's experts that the in-process dispatcher needs."""

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Float32) -> Float32: ...


class InProcessDispatcher:
    """Every device's experts in this process, no wire: what the wireless dispatcher must equal."""

    def __init__(self, experts_of_device: Sequence[LocalExperts]) -> None:
        self._experts = experts_of_device

    def refresh(self) -> None:
        """Everyone is always there."""

    def exchange(
        self, _number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block], watcher: Watcher = NOBODY
    ) -> tuple[list[Outcome], ExchangeTimes]:
        outcomes = []
        watcher.sent()
        for block in blocks:
            output_RD = self._experts[block.device].compute(layer, block.segments, hidden_TD[block.token_R])
            outcomes.append(Outcome(block, Status.ANSWERED, output_RD))
            watcher.answered(outcomes[-1])
        return outcomes, ExchangeTimes()


@dataclass(frozen=True, slots=True)
class WireSettings:
    """How blocks travel."""

    down: SchemeName
    up: SchemeName
    part_bytes: int
    window_bytes: int
    reply_s: float  # deadline of a round: what has not answered by then counts as late


class WirelessDispatcher:
    """Blocks to real nodes. Never waits longer than the deadline, whatever a node does."""

    def __init__(self, station: Station, settings: WireSettings, devices: int) -> None:
        self._station, self._settings = station, settings
        self._quantised, self._payload = KeptRows(np.uint8), KeptRows(np.uint8)
        self._replies = [KeptRows(np.float32) for _ in range(devices)]
        self.stray_messages = 0  # replies of rounds that are over: late ones, and duplicates

    def refresh(self) -> None:
        """Deal with what came since the last round; what belongs to older rounds is only counted."""
        while self._station.receive(0) is not None:
            self.stray_messages += 1

    def exchange(
        self, number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block], watcher: Watcher = NOBODY
    ) -> tuple[list[Outcome], ExchangeTimes]:
        times = ExchangeTimes()
        started_ns = monotonic_ns()
        rows_TB = quantise(hidden_TD, SCHEMES[self._settings.down], self._quantised)
        times.quantise_ns = monotonic_ns() - started_ns
        width = hidden_TD.shape[1]
        transfers = [self._transfer(block, rows_TB, number, layer, width) for block in blocks]
        current = Round(self._station.run, number, transfers)
        self._station.gone.clear()
        self._carry_out(current, times, started_ns + int(self._settings.reply_s * 1e9), watcher)
        return current.outcomes(), times

    def _transfer(self, block: Block, rows_TB: NDArray[np.uint8], number: int, layer: int, width: int) -> Transfer:
        settings = self._settings
        parts = part_count(block.rows, SCHEMES[settings.down].bytes_per_value * width, settings.part_bytes)
        request = RequestPart(
            self._station.run, number, 0, layer, 0, parts, block.rows, width, settings.down, settings.up, block.segments
        )
        return Transfer(block, rows_TB, request, settings.window_bytes, (self._payload, self._replies[block.device]))

    def _carry_out(self, current: Round, times: ExchangeTimes, deadline_ns: int, watcher: Watcher) -> None:
        unsent = self._send_what_fits(current, times)
        watcher.sent()
        while True:
            for device in self._station.gone & current.waiting:
                current.give_up(device, Status.LOST)
            waited_from_ns = monotonic_ns()
            left_ms = (deadline_ns - waited_from_ns) / 1e6
            if not current.waiting or left_ms <= 0:
                break
            mail = self._station.receive(min(left_ms, FULL_QUEUE_RETRY_MS if unsent else LIVENESS_CHECK_MS))
            times.wait_ns += monotonic_ns() - waited_from_ns
            if mail is not None:
                outcome = self._take(current, mail, times)
                if outcome is not None and outcome.status is Status.ANSWERED:
                    watcher.answered(outcome)
            if not current.all_sent:
                unsent = self._send_what_fits(current, times)
        for device in list(current.waiting):
            current.give_up(device, Status.LATE)

    def _send_what_fits(self, current: Round, times: ExchangeTimes) -> bool:
        """Device after device, until windows or queues are full: the first computes while the last is sent to.

        True if a queue refused a part.
        """
        refused = False
        current.all_sent = True
        for device in sorted(current.waiting):
            transfer = current.transfers[device]
            sent: bool | None = True
            while sent and not transfer.all_sent:
                started_ns = monotonic_ns()
                sent = self._send_part(transfer, started_ns)
                spent_ns = monotonic_ns() - started_ns
                transfer.outcome.send_ns += spent_ns
                times.send_ns += spent_ns
            refused |= sent is None
            current.all_sent &= transfer.all_sent
        return refused

    def _send_part(self, transfer: Transfer, now_ns: int) -> bool | None:
        """True: sent. False: nothing to send for now. None: the socket has no room."""
        part = transfer.next_part()
        if part is None:
            return False
        header, payload_RB = part
        if not self._station.send(self._station.registry.nodes[transfer.outcome.block.device], header, payload_RB):
            return None
        if transfer.outcome.bs_sent_ns is None:
            transfer.outcome.bs_sent_ns = now_ns
        transfer.part_sent(len(header), payload_RB.nbytes)
        return True

    def _take(self, current: Round, item: Mail, times: ExchangeTimes) -> Outcome | None:
        """The outcome that this mail was for; None where it came too late or breaks the rules."""
        started_ns = monotonic_ns()
        outcome = None
        try:
            if current.take(item.node.index, item.message, item.payload, started_ns):
                outcome = current.transfers[item.node.index].outcome
                outcome.bytes_up += item.header_bytes
            else:
                self.stray_messages += 1
        except MessageError as error:
            self._station.broken(item.node, error)
            current.give_up(item.node.index, Status.INVALID)
        times.dequantise_ns += monotonic_ns() - started_ns
        return outcome
