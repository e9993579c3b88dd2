"""Replies that nobody waits for any more: they come too late for their round, and still tell how long it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bs_node.blocks import Outcome
from bs_node.round import note_times
from bs_node.station import Mail
from testbed.runlog.schema import Status
from testbed.wire.messages import Rejected, ReplyPart


class LateReplies:
    """At most one expected reply per device, the newest: a node answers in order."""

    def __init__(self) -> None:
        self._expected: dict[int, tuple[int, Outcome]] = {}  # device -> round, what became of it
        self._answered: list[Outcome] = []
        self.strays = 0  # messages of no round that anybody remembers

    def expect(self, number: int, outcome: Outcome) -> None:
        """A request of round `number`, sent whole, that was given up as late or is a probe. The outcome is copied."""
        self._expected[outcome.block.device] = number, replace(outcome)

    def expects(self, device: int) -> bool:
        return device in self._expected

    def forget(self, devices: Iterable[int]) -> None:
        """Devices whose connection is gone, and with it whatever they owed."""
        for device in devices:
            self._expected.pop(device, None)

    def take(self, mail: Mail, now_ns: int) -> None:
        """Mail that belongs to no current round. Raises MessageError for a reply whose times cannot be."""
        device = mail.node.index
        number, outcome = self._expected.get(device, (None, None))
        if outcome is None or mail.message.round != number:
            self.strays += 1
        elif isinstance(mail.message, ReplyPart):
            outcome.bytes_up += mail.header_bytes + len(mail.payload)
            outcome.parts_up += 1
            if outcome.parts_up == mail.message.parts:
                self.forget([device])
                note_times(outcome, mail.message, now_ns)
                outcome.status = Status.ANSWERED
                self._answered.append(outcome)
        elif isinstance(mail.message, Rejected):
            self.forget([device])

    def collect(self) -> list[Outcome]:
        """What has been answered since the last call."""
        answered, self._answered = self._answered, []
        return answered
