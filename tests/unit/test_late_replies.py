from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from bs_node.blocks import Block, Outcome
from bs_node.late import LateReplies
from bs_node.registry import Node
from bs_node.station import Mail
from testbed.errors import MessageError
from testbed.runlog.schema import Status
from testbed.wire.messages import Credit, Rejected, ReplyPart

ROUND, SENT_NS, NOW_NS = 42, 100, 1000
HEADER_BYTES, PAYLOAD = 50, memoryview(bytes(192))
NODES = [Node(0, "near"), Node(1, "far")]


def late_outcome(device: int = 0, **values: Any) -> Outcome:
    """A block of six rows that was sent and given up."""
    six = np.arange(6)
    return Outcome(Block(device, six, 0 * six, [(device, 6)]), Status.LATE, bs_sent_ns=SENT_NS, dilation=5.0, **values)


def mail(device: int = 0, part: int = 0, parts: int = 1, **changed: Any) -> Mail:
    reply = ReplyPart(7, ROUND, 0, part, parts, 6, 8, 8, "fp32", 110, 190, 1, 2, 70, 3, 4)
    return Mail(NODES[device], replace(reply, **changed), PAYLOAD, HEADER_BYTES)


def expecting(*outcomes: Outcome) -> LateReplies:
    late = LateReplies()
    for outcome in outcomes:
        late.expect(ROUND, outcome)
    return late


def test_a_late_reply_still_tells_its_times() -> None:
    late = expecting(late_outcome())
    late.take(mail(), NOW_NS)
    (outcome,) = late.collect()
    assert outcome.status is Status.ANSWERED
    stamps = outcome.bs_sent_ns, outcome.node_received_ns, outcome.node_sent_ns, outcome.bs_received_ns
    assert stamps == (SENT_NS, 110, 190, NOW_NS)
    assert (outcome.node_queue_ns, outcome.node_compute_ns, outcome.node_padding_ns) == (1, 73, 3)
    assert (outcome.parts_up, outcome.bytes_up) == (1, HEADER_BYTES + len(PAYLOAD))
    assert outcome.dilation == 5.0  # of the round that it belongs to, whatever is in force by now
    assert outcome.output is None  # nobody waits for the rows any more


def test_what_was_answered_is_given_out_once_and_then_no_longer_expected() -> None:
    late = expecting(late_outcome())
    assert late.expects(0)
    assert not late.expects(1)
    late.take(mail(), NOW_NS)
    assert not late.expects(0)
    assert len(late.collect()) == 1
    assert late.collect() == []


def test_the_rows_of_the_round_stay_as_they_were_when_it_ended() -> None:
    of_the_round = late_outcome()
    late = expecting(of_the_round)
    late.take(mail(), NOW_NS)
    assert (of_the_round.status, of_the_round.bs_received_ns) == (Status.LATE, None)
    assert (of_the_round.bytes_up, of_the_round.parts_up) == (0, 0)


def test_a_reply_in_parts_is_whole_with_its_last_part() -> None:
    late = expecting(late_outcome())
    for part in range(2):
        late.take(mail(part=part, parts=3), NOW_NS)
        assert late.collect() == []
        assert late.expects(0)
    late.take(mail(part=2, parts=3), NOW_NS + 5)
    (outcome,) = late.collect()
    assert outcome.bs_received_ns == NOW_NS + 5
    assert (outcome.parts_up, outcome.bytes_up) == (3, 3 * (HEADER_BYTES + len(PAYLOAD)))


def test_parts_that_came_before_the_deadline_count_for_the_whole() -> None:
    in_time = HEADER_BYTES + len(PAYLOAD)
    late = expecting(late_outcome(parts_up=1, bytes_up=in_time))
    for part in (1, 2):
        late.take(mail(part=part, parts=3), NOW_NS)
    (outcome,) = late.collect()
    assert (outcome.parts_up, outcome.bytes_up) == (3, 3 * in_time)


def test_each_device_is_expected_by_itself() -> None:
    late = expecting(late_outcome(0), late_outcome(1))
    late.take(mail(1), NOW_NS)
    assert (late.expects(0), late.expects(1)) == (True, False)
    late.take(mail(0), NOW_NS)
    assert [outcome.block.device for outcome in late.collect()] == [1, 0]
    assert late.strays == 0


@pytest.mark.parametrize("stray", [mail(round=41), mail(round=43), mail(1)])
def test_a_reply_that_nobody_expects_is_counted_and_left_alone(stray: Mail) -> None:
    late = expecting(late_outcome())
    late.take(stray, NOW_NS)
    assert late.strays == 1
    assert late.collect() == []
    assert late.expects(0)


def test_of_two_requests_to_a_device_the_newer_is_expected() -> None:
    late = expecting(late_outcome())
    late.expect(ROUND + 1, late_outcome())
    late.take(mail(), NOW_NS)
    assert (late.strays, late.collect()) == (1, [])
    late.take(mail(round=ROUND + 1), NOW_NS)
    assert len(late.collect()) == 1


def test_who_is_forgotten_is_not_expected() -> None:
    late = expecting(late_outcome())
    late.forget([0])
    late.forget([1])
    assert not late.expects(0)
    late.take(mail(), NOW_NS)
    assert (late.strays, late.collect()) == (1, [])


def test_those_whose_connection_is_gone_are_forgotten_together_and_nobody_else() -> None:
    late = expecting(late_outcome(0), late_outcome(1))
    late.forget(set())
    assert late.expects(0)
    assert late.expects(1)
    late.forget({1, 7})
    assert late.expects(0)
    assert not late.expects(1)


def test_late_credit_teaches_nothing_and_the_reply_is_still_expected() -> None:
    late = expecting(late_outcome())
    late.take(Mail(NODES[0], Credit(ROUND, 0, 64), memoryview(b""), HEADER_BYTES), NOW_NS)
    assert (late.strays, late.collect()) == (0, [])
    assert late.expects(0)


def test_a_block_that_the_node_refuses_is_no_longer_expected() -> None:
    late = expecting(late_outcome())
    late.take(Mail(NODES[0], Rejected(ROUND, 0, "not mine"), memoryview(b""), HEADER_BYTES), NOW_NS)
    assert late.collect() == []
    assert not late.expects(0)  # or else it would never be probed again


@pytest.mark.parametrize("change", [{"sent_ns": 109}, {"sent_ns": 10**6}])
def test_times_that_cannot_be_break_the_rules_and_end_the_wait(change: dict[str, int]) -> None:
    late = expecting(late_outcome())
    with pytest.raises(MessageError, match="cannot have been the node's"):
        late.take(mail(**change), NOW_NS)
    assert late.collect() == []
    assert not late.expects(0)
