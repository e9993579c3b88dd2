"""Dispatch of one round to real nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic_ns

import numpy as np
from numpy.typing import NDArray

from bs_node.blocks import Block, Outcome
from bs_node.dispatcher import NOBODY, ExchangeTimes, Hidden, Watcher
from bs_node.late import LateReplies
from bs_node.round import EarlyEnd, Round, Transfer
from bs_node.station import Mail, Station
from testbed.errors import MessageError
from testbed.policies.base import FloatArray
from testbed.runlog.schema import Status
from testbed.wire.kept import KeptRows
from testbed.wire.messages import RequestPart
from testbed.wire.parts import part_count
from testbed.wire.quantization import SCHEMES, SchemeName, quantise

FULL_QUEUE_RETRY_MS = 1
LIVENESS_CHECK_MS = 20
FIRST_PROBE = 2**62  # rounds of a run never get so far


@dataclass(frozen=True, slots=True)
class WireSettings:
    """How blocks travel."""

    down: SchemeName
    up: SchemeName
    part_bytes: int
    window_bytes: int
    padded_width: int  # rows are filled up to this many values; 0: as they are
    reply_s: float  # deadline of a round: what has not answered by then counts as late


class WirelessDispatcher:
    """Blocks to real nodes. Never waits longer than the deadline, whatever a node does."""

    def __init__(self, station: Station, settings: WireSettings) -> None:
        self._station, self._settings = station, settings
        self._quantised, self._payload = KeptRows(np.uint8), KeptRows(np.uint8)
        self.dilation = 1.0
        self.air_ratio_WN: FloatArray | None = None
        self.late = LateReplies()
        self._probes = 0

    def refresh(self) -> None:
        """Deal with what came since the last round: replies that were late, or of probes."""
        while (mail := self._station.receive(0)) is not None:
            self._take_late(mail)
        self.late.forget(self._station.gone)

    def _take_late(self, mail: Mail) -> None:
        try:
            self.late.take(mail, monotonic_ns())
        except MessageError as error:
            self._station.broken(mail.node, error)

    def collect_late(self) -> list[Outcome]:
        return self.late.collect()

    def probe(self, device: int, layer: int, expert: int, width: int) -> None:
        """Send a row that nobody waits for: its reply is collected with the late ones."""
        if self.late.expects(device):
            return
        one = np.zeros(1, np.int64)
        rows_TB = quantise(
            np.zeros((1, width), np.float32), SCHEMES[self._settings.down], None, self._settings.padded_width
        )
        self._probes += 1
        number = FIRST_PROBE + self._probes
        transfer = self._transfer(Block(device, one, one, [(expert, 1)]), rows_TB, number, layer, width)
        if self._send_part(transfer, monotonic_ns()) and transfer.all_sent:
            self.late.expect(number, transfer.outcome)

    def exchange(
        self,
        number: int,
        layer: int,
        hidden_TD: Hidden,
        blocks: Sequence[Block],
        watcher: Watcher = NOBODY,
        early_end: EarlyEnd | None = None,
    ) -> tuple[list[Outcome], ExchangeTimes]:
        times = ExchangeTimes()
        started_ns = monotonic_ns()
        scheme, padded_width = SCHEMES[self._settings.down], self._settings.padded_width
        if isinstance(hidden_TD, np.ndarray):
            rows_TB = quantise(hidden_TD, scheme, self._quantised, padded_width)
        else:
            rows_TB = hidden_TD.quantise(scheme, padded_width)
        times.quantise_ns = monotonic_ns() - started_ns
        width = hidden_TD.shape[1]
        current, refused = Round(self._station.run, number), False
        self._station.gone.clear()
        for block in blocks:
            current.add(self._transfer(block, rows_TB, number, layer, width))
        for transfer in current.transfers.values():  # the first computes while the last is sent to
            refused |= self._send_to(transfer, times)
        deadline_ns = started_ns + int(self._settings.reply_s * 1e9)
        self._carry_out(current, refused, times, deadline_ns, watcher, early_end)
        for transfer in current.transfers.values():
            if transfer.outcome.status is Status.LATE and transfer.all_sent:
                self.late.expect(number, transfer.outcome)
        return current.outcomes(), times

    def _transfer(self, block: Block, rows_TB: NDArray[np.uint8], number: int, layer: int, width: int) -> Transfer:
        settings, padded = self._settings, max(width, self._settings.padded_width)
        parts = part_count(block.rows, SCHEMES[settings.down].bytes_per_value * padded, settings.part_bytes)
        request = RequestPart(
            self._station.run, number, 0, layer, 0, parts, block.rows, width, padded, settings.down, settings.up,
            block.segments,
        )  # fmt: skip
        transfer = Transfer(block, rows_TB, request, settings.window_bytes, self._payload)
        transfer.outcome.dilation = self.dilation
        if self.air_ratio_WN is not None:
            transfer.outcome.air_ratio = tuple(self.air_ratio_WN[:, block.device].tolist())
        return transfer

    def _carry_out(
        self,
        current: Round,
        refused: bool,
        times: ExchangeTimes,
        deadline_ns: int,
        watcher: Watcher,
        early_end: EarlyEnd | None,
    ) -> None:
        """Until all have answered or the deadline. `refused`: some queue had no room for a part."""
        watcher.sent()
        while True:
            for device in self._station.gone & current.waiting:
                current.give_up(device, Status.LOST)
            for outcome in current.take_ended():
                if outcome.status is Status.ANSWERED:
                    watcher.answered(outcome)
                if early_end is not None:
                    deadline_ns = early_end.deadline_ns(outcome, monotonic_ns(), deadline_ns)
            waited_from_ns = monotonic_ns()
            left_ms = (deadline_ns - waited_from_ns) / 1e6
            if not current.waiting or left_ms <= 0:
                break
            mail = self._station.receive(min(left_ms, FULL_QUEUE_RETRY_MS if refused else LIVENESS_CHECK_MS))
            times.wait_ns += monotonic_ns() - waited_from_ns
            if mail is not None:
                self._take(current, mail, times)
            if not current.all_sent:
                refused = sum(self._send_to(transfer, times) for transfer in current.unsent()) > 0
        for device in list(current.waiting):
            current.give_up(device, Status.LATE)

    def _send_to(self, transfer: Transfer, times: ExchangeTimes) -> bool:
        """Parts until all are sent or the window or the queue is full. True if the queue refused one."""
        sent: bool | None = True
        while sent and not transfer.all_sent:
            started_ns = monotonic_ns()
            sent = self._send_part(transfer, started_ns)
            spent_ns = monotonic_ns() - started_ns
            transfer.outcome.send_ns += spent_ns
            times.send_ns += spent_ns
        return sent is None

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

    def _take(self, current: Round, item: Mail, times: ExchangeTimes) -> None:
        started_ns = monotonic_ns()
        try:
            if current.take(item.node.index, item.message, item.payload, started_ns):
                current.transfers[item.node.index].outcome.bytes_up += item.header_bytes
            else:
                self._take_late(item)
        except MessageError as error:
            self._station.broken(item.node, error)
            current.give_up(item.node.index, Status.INVALID)
        times.dequantise_ns += monotonic_ns() - started_ns
