"""Dispatch of one round: over the air, or in this process. The latter is the specification of the former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Protocol

import numpy as np

from bs_node.blocks import Block, Float32, Outcome
from bs_node.round import Round, Transfer, make_transfer
from bs_node.station import Mail, Station
from testbed.errors import MessageError
from testbed.runlog.schema import Status
from testbed.wire.parts import KeptRows
from testbed.wire.quantization import SCHEMES, Buffers, quantise

FULL_QUEUE_RETRY_MS = 1
LIVENESS_CHECK_MS = 100


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
        self, number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block]
    ) -> tuple[list[Outcome], ExchangeTimes]: ...


class LocalExperts(Protocol):
    """The part of a node's experts that the in-process dispatcher needs."""

    def compute(self, layer: int, segments: Sequence[Sequence[int]], x_RD: Float32, out_RD: Float32) -> None: ...


class InProcessDispatcher:
    """Every device's experts in this process, no wire: what the wireless dispatcher must equal."""

    def __init__(self, experts_of_device: Sequence[LocalExperts]) -> None:
        self._experts = experts_of_device

    def refresh(self) -> None:
        """Everyone is always there."""

    def exchange(
        self, _number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block]
    ) -> tuple[list[Outcome], ExchangeTimes]:
        outcomes = []
        for block in blocks:
            rows_RD = hidden_TD[block.token_R]
            output_RD = np.empty_like(rows_RD)
            self._experts[block.device].compute(layer, block.segments, rows_RD, output_RD)
            outcomes.append(Outcome(block, Status.ANSWERED, output_RD))
        return outcomes, ExchangeTimes()


@dataclass(frozen=True, slots=True)
class WireSettings:
    """How blocks travel."""

    down: str
    up: str
    part_bytes: int
    window_bytes: int
    reply_s: float  # deadline of a round: what has not answered by then counts as late


class WirelessDispatcher:
    """Blocks to real nodes. Never waits longer than the deadline, whatever a node does."""

    def __init__(self, station: Station, settings: WireSettings, devices: int) -> None:
        self._station, self._settings = station, settings
        self._buffers = Buffers()
        self._rooms = [KeptRows() for _ in range(devices)]
        self.stray_messages = 0  # replies of rounds that are over: late ones, and duplicates

    def refresh(self) -> None:
        """Deal with what came since the last round; what belongs to older rounds is only counted."""
        self.stray_messages += len(self._station.receive(0))

    def exchange(
        self, number: int, layer: int, hidden_TD: Float32, blocks: Sequence[Block]
    ) -> tuple[list[Outcome], ExchangeTimes]:
        times = ExchangeTimes()
        started_ns = monotonic_ns()
        quantised = quantise(hidden_TD, SCHEMES[self._settings.down], self._buffers)
        times.quantise_ns = monotonic_ns() - started_ns
        settings = self._settings
        transfers = [
            make_transfer(
                block, quantised, self._rooms[block.device], run=self._station.run, number=number, layer=layer,
                reply_scheme=settings.up, part_bytes=settings.part_bytes, window_bytes=settings.window_bytes,
            )
            for block in blocks
        ]  # fmt: skip
        current = Round(self._station.run, number, transfers)
        self._station.gone.clear()
        self._carry_out(current, times, started_ns + int(settings.reply_s * 1e9))
        return current.outcomes(), times

    def _carry_out(self, current: Round, times: ExchangeTimes, deadline_ns: int) -> None:
        while True:
            unsent = self._send_what_fits(current, times)
            for device in self._station.gone & current.waiting:
                current.give_up(device, Status.LOST)
            left_ms = (deadline_ns - monotonic_ns()) / 1e6
            if not current.waiting or left_ms <= 0:
                break
            waited_from_ns = monotonic_ns()
            mail = self._station.receive(min(left_ms, FULL_QUEUE_RETRY_MS if unsent else LIVENESS_CHECK_MS))
            times.wait_ns += monotonic_ns() - waited_from_ns
            for item in mail:
                self._take(current, item, times)
        for device in list(current.waiting):
            current.give_up(device, Status.LATE)

    def _send_what_fits(self, current: Round, times: ExchangeTimes) -> bool:
        """One part per device in turn, until windows or queues are full. True if a queue refused a part."""
        active = [t for device in current.waiting if not (t := current.transfers[device]).all_sent]
        refused = False
        while active:
            still_active: list[Transfer] = []
            for transfer in active:
                started_ns = monotonic_ns()
                sent = self._send_part(transfer, started_ns)
                spent_ns = monotonic_ns() - started_ns
                transfer.outcome.send_ns += spent_ns
                times.send_ns += spent_ns
                if sent and not transfer.all_sent:
                    still_active.append(transfer)
                refused |= sent is None
            active = still_active
        return refused

    def _send_part(self, transfer: Transfer, now_ns: int) -> bool | None:
        """True: sent. False: nothing to send for now. None: the socket has no room."""
        part = transfer.next_part()
        if part is None:
            return False
        header, payload = part
        if not self._station.send(self._station.registry.nodes[transfer.outcome.block.device], header, payload):
            return None
        if transfer.outcome.sent_ns is None:
            transfer.outcome.sent_ns = now_ns
        transfer.part_sent(len(header), len(payload))
        return True

    def _take(self, current: Round, item: Mail, times: ExchangeTimes) -> None:
        started_ns = monotonic_ns()
        try:
            if current.take(item.node.index, item.message, item.payload, started_ns):
                current.transfers[item.node.index].outcome.bytes_up += item.header_bytes
            else:
                self.stray_messages += 1
        except MessageError as error:
            self._station.broken(item.node, error)
            current.give_up(item.node.index, Status.INVALID)
        times.dequantise_ns += monotonic_ns() - started_ns
