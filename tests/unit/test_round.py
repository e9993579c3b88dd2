from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from bs_node.blocks import Block, Output
from bs_node.round import Round, Transfer
from testbed.errors import MessageError
from testbed.runlog.schema import Status
from testbed.wire.kept import KeptRows
from testbed.wire.messages import Credit, Rejected, ReplyPart, RequestPart, decode_from_base_station
from testbed.wire.parts import Assembler, part_count, part_rows
from testbed.wire.quantization import SCHEMES, SchemeName, quantise

RUN, NUMBER, LAYER, WIDTH = 7, 42, 3, 8
NOW_NS = 1000
EMPTY = memoryview(b"")


def hidden(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def transfer(
    device: int = 0, rows: int = 6, part_bytes: int = 64, window_bytes: int = 10**6, scheme: SchemeName = "fp32"
) -> Transfer:
    """A block of `rows` rows of 32 bytes in fp32: two rows to a part unless told otherwise."""
    token_R = np.arange(rows, dtype=np.int64)[::-1].copy()
    block = Block(device, token_R, np.zeros(rows, np.int64), [(device, rows)])
    parts = part_count(rows, SCHEMES[scheme].bytes_per_value * WIDTH, part_bytes)
    request = RequestPart(RUN, NUMBER, 0, LAYER, 0, parts, rows, WIDTH, WIDTH, scheme, "fp32", block.segments)
    return Transfer(block, quantise(hidden(rows), SCHEMES[scheme]), request, window_bytes, KeptRows(np.uint8))


def send_all(sending: Transfer) -> list[tuple[RequestPart, bytes]]:
    """Every part that may leave now, as the node would read it."""
    sent = []
    while (part := sending.next_part()) is not None:
        header, payload_RB = part
        sending.part_sent(len(header), payload_RB.nbytes)
        request = decode_from_base_station(header)
        assert isinstance(request, RequestPart)
        sent.append((request, payload_RB.tobytes()))
    return sent


def reply(rows: int = 6, parts: int = 1, **changed: Any) -> list[tuple[ReplyPart, memoryview]]:
    """What a node answers to `transfer(rows=rows)`, and its payloads."""
    head = ReplyPart(RUN, NUMBER, 0, 0, parts, rows, WIDTH, WIDTH, "fp32", 110, 190, 1, 2, 70, 3, 4)
    rows_RB = quantise(hidden(rows, seed=1), SCHEMES["fp32"])
    return [
        (replace(head, part=part, **changed), memoryview(rows_RB[part_rows(rows, parts, part)].tobytes()))
        for part in range(parts)
    ]


def started(*devices: int, **settings: Any) -> Round:
    """A round whose requests have been sent."""
    current = Round(RUN, NUMBER, [transfer(device, **settings) for device in devices])
    for sending in current.transfers.values():
        send_all(sending)
    return current


def added_up(output: Output, rows: int) -> NDArray[np.float32]:
    """Each row once, to a token of its own."""
    out_TD = np.zeros((rows, WIDTH), np.float32)
    output.accumulate(slice(0, rows), np.ones(rows, np.float32), np.arange(rows), out_TD)
    return out_TD


def status(current: Round, device: int) -> Status:
    return current.transfers[device].outcome.status


@given(rows=st.integers(1, 40), part_bytes=st.integers(1, 400), scheme=st.sampled_from(sorted(SCHEMES)))
def test_the_node_gets_the_rows_of_its_block_in_the_blocks_order(rows: int, part_bytes: int, scheme: str) -> None:
    sending = transfer(rows=rows, part_bytes=part_bytes, scheme=scheme)
    sent = send_all(sending)
    first = sent[0][0]
    assert (first.run, first.round, first.layer, first.segments) == (RUN, NUMBER, LAYER, [(0, rows)])
    assembler = Assembler(first, KeptRows(np.float32))
    assert [assembler.add(*part) for part in sent] == [False] * (len(sent) - 1) + [True]
    if scheme == "fp32":
        assert assembler.block_RD.tobytes() == hidden(rows)[::-1].tobytes()
    assert sending.all_sent
    assert sending.outcome.parts_down == len(sent)
    assert sending.outcome.bytes_down > sum(len(payload) for _, payload in sent)


@given(
    rows=st.integers(1, 40),
    part_bytes=st.integers(1, 200),
    window_bytes=st.integers(1, 1000),
    credited_shares=st.lists(st.floats(0, 1), max_size=60),
)
def test_the_window_is_never_exceeded_but_by_a_single_part_and_credit_always_opens_it(
    rows: int, part_bytes: int, window_bytes: int, credited_shares: list[float]
) -> None:
    sending = transfer(rows=rows, part_bytes=part_bytes, window_bytes=window_bytes)
    sent_bytes = credited_bytes = 0
    shares = iter(credited_shares)
    while not sending.all_sent:
        for _, payload in send_all(sending):
            assert sent_bytes == credited_bytes or sent_bytes + len(payload) - credited_bytes <= window_bytes
            sent_bytes += len(payload)
        credited_bytes += int((sent_bytes - credited_bytes) * next(shares, 1.0))
        sending.credited(Credit(NUMBER, 0, credited_bytes))
    assert sent_bytes == SCHEMES["fp32"].payload_bytes(rows, WIDTH)


def test_a_part_that_the_socket_refused_is_offered_again() -> None:
    sending = transfer()
    first, again = [sending.next_part() for _ in range(2)]
    assert first is not None
    assert again is not None
    assert first[0] == again[0]
    assert (first[1] == again[1]).all()
    assert sending.outcome.parts_down == 0


@pytest.mark.parametrize("received_bytes", [65, 2**40])
def test_credit_for_more_than_was_sent_is_refused(received_bytes: int) -> None:
    current = Round(RUN, NUMBER, [transfer(window_bytes=64)])
    send_all(current.transfers[0])
    with pytest.raises(MessageError, match=f"credit for {received_bytes} bytes of 64 sent"):
        current.take(0, Credit(NUMBER, 0, received_bytes), EMPTY, NOW_NS)


def test_credit_is_never_taken_back() -> None:
    current = started(0)
    assert current.take(0, Credit(NUMBER, 0, 128), EMPTY, NOW_NS)
    assert current.take(0, Credit(NUMBER, 0, 128), EMPTY, NOW_NS)
    with pytest.raises(MessageError, match="credit for 64 bytes"):
        current.take(0, Credit(NUMBER, 0, 64), EMPTY, NOW_NS)


@given(
    order=st.permutations([(device, part) for device in range(3) for part in range(3)]),
)
def test_replies_may_come_in_any_order_of_devices_and_parts(order: list[tuple[int, int]]) -> None:
    current = started(0, 1, 2)
    answers = reply(parts=3)
    for device, part in order:
        assert current.take(device, *answers[part], NOW_NS)
    assert current.waiting == set()
    for outcome in current.outcomes():
        assert outcome.status is Status.ANSWERED
        assert outcome.output is not None
        assert added_up(outcome.output, 6).tobytes() == hidden(6, seed=1).tobytes()
        assert outcome.parts_up == 3


def test_an_outcome_tells_what_clocks_and_counters_said() -> None:
    current = started(0)
    current.transfers[0].outcome.bs_sent_ns = 100
    ((part, payload),) = reply()
    current.take(0, part, payload, NOW_NS)
    outcome = current.transfers[0].outcome
    assert outcome.rtt_ns == NOW_NS - 100
    assert (outcome.node_received_ns, outcome.node_sent_ns) == (110, 190)
    assert (outcome.node_queue_ns, outcome.node_dequantise_ns, outcome.node_quantise_ns) == (1, 2, 4)
    assert (outcome.node_compute_ns, outcome.node_padding_ns) == (73, 3)  # the padding is part of the compute
    assert outcome.bytes_up >= len(payload)


def test_a_device_is_waited_for_until_its_last_part() -> None:
    current = started(0, 1)
    for part, payload in reply(parts=3)[:2]:
        assert current.take(0, part, payload, NOW_NS)
    assert current.waiting == {0, 1}
    assert current.transfers[0].outcome.output is None
    current.give_up(0, Status.LATE)
    assert status(current, 0) is Status.LATE
    assert current.transfers[0].outcome.output is None
    assert current.transfers[0].outcome.rtt_ns is None
    assert current.transfers[0].outcome.parts_up == 2


def test_a_part_of_a_reply_that_comes_twice_breaks_the_rules() -> None:
    current = started(0)
    part, payload = reply(parts=3)[0]
    assert current.take(0, part, payload, NOW_NS)
    with pytest.raises(MessageError, match="came twice"):
        current.take(0, part, payload, NOW_NS)


def test_what_comes_after_a_complete_reply_is_of_no_use() -> None:
    current = started(0, 1)
    ((part, payload),) = reply()
    assert current.take(0, part, payload, NOW_NS)
    before = current.transfers[0].outcome.bs_received_ns
    for late in (part, Credit(NUMBER, 0, 10**9), Rejected(NUMBER, 0, "no")):
        assert not current.take(0, late, payload, NOW_NS + 1)
    assert status(current, 0) is Status.ANSWERED
    assert current.transfers[0].outcome.bs_received_ns == before
    current.give_up(0, Status.LOST)
    assert status(current, 0) is Status.ANSWERED


@pytest.mark.parametrize("change", [{"run": 8}, {"round": 41}, {"round": 43}, {"attempt": 1}])
def test_a_reply_to_another_request_is_left_alone(change: dict[str, int]) -> None:
    current = started(0)
    ((part, payload),) = reply(**change)
    assert not current.take(0, part, payload, NOW_NS)
    assert current.waiting == {0}
    ((part, payload),) = reply()
    assert current.take(0, part, payload, NOW_NS)
    assert status(current, 0) is Status.ANSWERED


@pytest.mark.parametrize(
    "message", [Credit(41, 0, 10**9), Credit(42, 1, 10**9), Rejected(41, 0, ""), Rejected(42, 1, "")]
)
def test_credit_and_rejection_of_another_request_are_left_alone(message: Any) -> None:
    current = started(0)
    assert not current.take(0, message, EMPTY, NOW_NS)
    assert current.waiting == {0}


@pytest.mark.parametrize("device", [1, -1, 99])
def test_what_a_device_sends_that_was_asked_nothing_is_left_alone(device: int) -> None:
    current = started(0)
    ((part, payload),) = reply()
    assert not current.take(device, part, payload, NOW_NS)
    assert not current.take(device, Rejected(NUMBER, 0, "no"), EMPTY, NOW_NS)
    assert current.waiting == {0}


def test_a_rejection_ends_the_wait_for_that_device_only() -> None:
    current = started(0, 1)
    assert current.take(0, Rejected(NUMBER, 0, "not my expert"), EMPTY, NOW_NS)
    assert current.waiting == {1}
    assert status(current, 0) is Status.REJECTED


@pytest.mark.parametrize("why", [Status.LOST, Status.LATE, Status.INVALID, Status.REJECTED])
def test_a_device_given_up_keeps_its_first_reason_and_its_reply_is_not_taken(why: Status) -> None:
    current = started(0, 1)
    current.give_up(0, why)
    current.give_up(0, Status.LATE)
    ((part, payload),) = reply()
    assert not current.take(0, part, payload, NOW_NS)
    assert current.waiting == {1}
    assert status(current, 0) is why
    assert current.transfers[0].outcome.output is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 5}, "reply of 5 x 8 fp32 is not what was asked for"),
        ({"rows": 2**22}, "reply of 4194304 x 8"),
        ({"width": 9}, "reply of 6 x 9"),
        ({"width": 2**20}, "reply of 6 x 1048576"),
        ({"scheme": "int8"}, "reply of 6 x 8 int8"),
        ({"parts": 7}, "6 rows do not travel in 7 parts"),
        ({"parts": 65535}, "do not travel"),
        ({"part": 1}, "does not exist"),
        ({"parts": 2}, "payload of 192 bytes"),
    ],
)
def test_a_reply_that_is_not_as_asked_breaks_the_rules_and_gives_no_output(change: dict[str, Any], words: str) -> None:
    current = started(0, 1)
    ((part, payload),) = reply()
    with pytest.raises(MessageError, match=words):
        current.take(0, replace(part, **change), payload, NOW_NS)
    current.give_up(0, Status.INVALID)
    assert current.transfers[0].outcome.output is None
    assert current.waiting == {1}


@pytest.mark.parametrize("parts", [1, 3])
def test_a_reply_whose_times_cannot_be_gives_no_output(parts: int) -> None:
    current = started(0)
    *before, (last, payload) = reply(parts=parts)
    for part in before:
        current.take(0, *part, NOW_NS)
    sent_ns = current.transfers[0].outcome.bs_sent_ns or 0
    with pytest.raises(MessageError, match="cannot have been the node's"):
        current.take(0, last, payload, sent_ns + last.sent_ns - last.received_ns - 10**6)
    current.give_up(0, Status.INVALID)
    assert current.transfers[0].outcome.output is None


@pytest.mark.parametrize("change", [{"compute_ns": 71}, {"parts": 2}, {"parts": 1}, {"sent_ns": 0}])
def test_parts_of_a_reply_that_contradict_each_other_break_the_rules(change: dict[str, Any]) -> None:
    current = started(0)
    first, second, _ = reply(parts=3)
    current.take(0, *first, NOW_NS)
    with pytest.raises(MessageError, match="contradicts"):
        current.take(0, replace(second[0], **change), second[1], NOW_NS)


@pytest.mark.parametrize("payload", [b"", bytes(191), bytes(193), b"\xff" * 192])
def test_a_broken_payload_breaks_the_rules(payload: bytes) -> None:
    current = started(0)
    ((part, _),) = reply()
    with pytest.raises(MessageError, match="payload"):
        current.take(0, part, memoryview(payload), NOW_NS)


def test_a_reply_before_the_whole_request_was_sent_breaks_the_rules() -> None:
    current = Round(RUN, NUMBER, [transfer(window_bytes=64)])
    send_all(current.transfers[0])
    ((part, payload),) = reply()
    with pytest.raises(MessageError, match="reply after 1 of 3 parts of the request"):
        current.take(0, part, payload, NOW_NS)


def test_a_round_with_nothing_to_send_waits_for_nobody() -> None:
    current = Round(RUN, NUMBER, [])
    assert current.waiting == set()
    assert current.outcomes() == []
