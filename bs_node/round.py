"""One expert round at the base station, without sockets or clocks: events in, parts to send out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from bs_node.blocks import Block, Outcome, Output
from testbed.errors import MessageError
from testbed.policies.base import Deadline
from testbed.runlog.schema import Status
from testbed.wire.kept import KeptRows
from testbed.wire.messages import Credit, Rejected, ReplyPart, RequestPart, encode
from testbed.wire.parts import ReceivedRows, part_rows, whole_reply

CLOCKS_DIFFER = 1e-3  # at most: a node's second is that much longer or shorter than ours


class Transfer:
    """The way of one block to its device and back: numbered parts of whole rows, taken from rows_TB."""

    def __init__(
        self,
        block: Block,
        rows_TB: NDArray[np.uint8],
        request: RequestPart,
        window_bytes: int,
        payload_room: KeptRows[np.uint8],
    ) -> None:
        """`request` is the header of the first part; in `payload_room` payloads are gathered, one at a time."""
        self.outcome = Outcome(block, Status.LOST)
        self._request, self._rows_TB, self._window_bytes = request, rows_TB, window_bytes
        self._payload_room = payload_room
        self._next_part = self._sent_bytes = self._credited_bytes = 0
        self._parts: ReceivedRows | None = None  # of a reply that travels in more than one
        self._reply: Output | None = None  # once it is whole

    @property
    def all_sent(self) -> bool:
        return self._next_part == self._request.parts

    def next_part(self) -> tuple[bytes, NDArray[np.uint8]] | None:
        """Header and payload of the next part that fits the window; None where there is none.

        The payload is valid until its room is used again. With nothing on its way any part fits, so that one
        above the window cannot stop the block.
        """
        request, number = self._request, self._next_part
        if number == request.parts:
            return None
        rows, row_bytes = part_rows(request.rows, request.parts, number), self._rows_TB.shape[1]
        count = rows.stop - rows.start
        on_its_way_bytes = self._sent_bytes - self._credited_bytes
        if on_its_way_bytes and on_its_way_bytes + count * row_bytes > self._window_bytes:
            return None
        payload_RB = self._payload_room.take(count, row_bytes)
        self._rows_TB.take(self.outcome.block.token_R[rows], 0, payload_RB, "clip")  # "raise" would copy twice
        return encode(replace(request, part=number) if number else request), payload_RB

    def part_sent(self, header_bytes: int, payload_bytes: int) -> None:
        self._next_part += 1
        self._sent_bytes += payload_bytes
        self.outcome.bytes_down += header_bytes + payload_bytes
        self.outcome.parts_down += 1

    def asked_for(self, message: Credit | ReplyPart | Rejected) -> bool:
        """Whether a message answers this very request, not an earlier one of the same number."""
        request = self._request
        if isinstance(message, ReplyPart) and message.run != request.run:
            return False
        return (message.round, message.attempt) == (request.round, request.attempt)

    def credited(self, credit: Credit) -> None:
        if not self._credited_bytes <= credit.received_bytes <= self._sent_bytes:
            raise MessageError(f"credit for {credit.received_bytes} bytes of {self._sent_bytes} sent")
        self._credited_bytes = credit.received_bytes

    def reply_part(self, part: ReplyPart, payload: memoryview) -> bool:
        """Take one part of the reply; True when it is complete. Raises MessageError where it is not as asked."""
        request = self._request
        if self._next_part < request.parts:
            raise MessageError(f"reply after {self._next_part} of {request.parts} parts of the request")
        wanted = request.rows, request.width, request.padded_width, request.reply_scheme
        if (part.rows, part.width, part.padded_width, part.scheme) != wanted:
            raise MessageError(f"reply of {part.rows} x {part.width} {part.scheme} is not what was asked for")
        if self._parts is None and part.parts == 1:
            self._reply = whole_reply(part, payload)
        else:
            self._parts = self._parts or ReceivedRows(part)
            if self._parts.add(part, payload):
                self._reply = self._parts
        self.outcome.bytes_up += len(payload)
        self.outcome.parts_up += 1
        return self._reply is not None

    def complete(self, part: ReplyPart, now_ns: int) -> None:
        note_times(self.outcome, part, now_ns)
        self.outcome.status = Status.ANSWERED
        self.outcome.output = self._reply


def note_times(outcome: Outcome, last: ReplyPart, now_ns: int) -> None:
    """What the last part of a reply says of the block's times. Raises MessageError where these cannot be."""
    residence_ns, rtt_ns = last.sent_ns - last.received_ns, now_ns - (outcome.bs_sent_ns or 0)
    if not 0 <= residence_ns <= rtt_ns * (1 + CLOCKS_DIFFER):
        raise MessageError(f"{residence_ns} ns of a round trip of {rtt_ns} ns cannot have been the node's")
    outcome.bs_received_ns = now_ns
    outcome.node_received_ns, outcome.node_sent_ns = last.received_ns, last.sent_ns
    outcome.node_queue_ns, outcome.node_dequantise_ns = last.queue_ns, last.dequantise_ns
    outcome.node_compute_ns, outcome.node_padding_ns = last.compute_ns + last.padding_ns, last.padding_ns
    outcome.node_quantise_ns = last.quantise_ns
    if last.staging_ns is not None:
        outcome.node_staging_ns = last.staging_ns


class EarlyEnd:
    """The deadline of a round that ends soon after every token has had `k_min` answers, or all that it was sent for."""

    def __init__(self, wanted: Deadline, dilation: float, blocks: Sequence[Block], tokens: int) -> None:
        self._after_ns = int(wanted.after_s * dilation * 1e9)
        self._outstanding_T = np.zeros(tokens, np.int64)
        for block in blocks:
            np.add.at(self._outstanding_T, block.token_R, 1)
        self._missing_T = np.minimum(self._outstanding_T, wanted.k_min)

    def deadline_ns(self, ended: Outcome, now_ns: int, before_ns: int) -> int:
        """The deadline once this block is answered, or can be no more."""
        if self._missing_T.max(initial=0) <= 0:
            return before_ns
        np.subtract.at(self._outstanding_T, ended.block.token_R, 1)
        if ended.status is Status.ANSWERED:
            np.subtract.at(self._missing_T, ended.block.token_R, 1)
        np.minimum(self._missing_T, self._outstanding_T, out=self._missing_T)
        return before_ns if self._missing_T.max() > 0 else min(before_ns, now_ns + self._after_ns)


class Round:
    """All transfers of one round. `waiting` are the devices that still owe a reply."""

    def __init__(self, run: int, number: int, transfers: Sequence[Transfer] = ()) -> None:
        self.run, self.number = run, number
        self.transfers: dict[int, Transfer] = {}
        self.waiting: set[int] = set()
        self.all_sent = False  # as far as `unsent` last saw
        self._ended: list[Outcome] = []
        for transfer in transfers:
            self.add(transfer)

    def add(self, transfer: Transfer) -> None:
        device = transfer.outcome.block.device
        self.transfers[device] = transfer
        self.waiting.add(device)

    def unsent(self) -> list[Transfer]:
        """Those of which parts are still to be sent, in the order of their devices."""
        waiting = (self.transfers[device] for device in sorted(self.waiting))
        unsent = [transfer for transfer in waiting if not transfer.all_sent]
        self.all_sent = not unsent
        return unsent

    def take(self, device: int, message: Credit | ReplyPart | Rejected, payload: memoryview, now_ns: int) -> bool:
        """A message of this round from a device. False where it belongs to another round (late, or never asked).

        Raises MessageError for one that breaks the rules: the device's pairs are then invalid.
        """
        if device not in self.waiting:
            return False
        transfer = self.transfers[device]
        if not transfer.asked_for(message):
            return False
        if isinstance(message, ReplyPart):
            if transfer.reply_part(message, payload):
                transfer.complete(message, now_ns)
                self._end(device)
        elif isinstance(message, Credit):
            transfer.credited(message)
        else:
            self.give_up(device, Status.REJECTED)
        return True

    def give_up(self, device: int, status: Status) -> None:
        """No reply will be waited for any more."""
        if device in self.waiting:
            self.transfers[device].outcome.status = status
            self._end(device)

    def _end(self, device: int) -> None:
        self.waiting.discard(device)
        self._ended.append(self.transfers[device].outcome)

    def take_ended(self) -> list[Outcome]:
        """What nobody waits for any more since the last call: answered, or given up."""
        ended, self._ended = self._ended, []
        return ended

    def outcomes(self) -> list[Outcome]:
        return [transfer.outcome for transfer in self.transfers.values()]
