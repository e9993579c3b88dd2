from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_node.blocks import Block, Outcome, group
from bs_node.round import EarlyEnd, note_times
from testbed.errors import MessageError
from testbed.policies.base import DROPPED, Deadline
from testbed.runlog.schema import Status
from testbed.wire.messages import ReplyPart

DEVICES, AFTER_S, NEVER_NS = 4, 0.25, 10**12


def blocks_of(device_TK: list[list[int]]) -> list[Block]:
    """Expert n lives on device n."""
    place_TK = np.array(device_TK)
    return group(np.maximum(place_TK, 0), place_TK, DEVICES, DEVICES)


def answered(block: Block) -> Outcome:
    return Outcome(block, Status.ANSWERED)


def deadlines(
    device_TK: list[list[int]], order: list[int], k_min: int, dilation: float = 1.0, lost: tuple[int, ...] = ()
) -> list[int]:
    """After each block's end, one per second in this order of devices: an answer, but for those `lost`."""
    blocks = blocks_of(device_TK)
    end = EarlyEnd(Deadline(k_min, AFTER_S), dilation, blocks, len(device_TK))
    block_of, deadline_ns, found = {block.device: block for block in blocks}, NEVER_NS, []
    for second, device in enumerate(order):
        ended = Outcome(block_of[device], Status.LOST if device in lost else Status.ANSWERED)
        deadline_ns = end.deadline_ns(ended, second * 10**9, deadline_ns)
        found.append(deadline_ns)
    return found


@given(
    device_TK=st.integers(1, 3).flatmap(
        lambda k: st.lists(st.lists(st.integers(DROPPED, DEVICES - 1), min_size=k, max_size=k), min_size=1, max_size=6)
    ),
    order=st.permutations(range(DEVICES)),
    k_min=st.integers(1, 4),
    dilation=st.sampled_from([1.0, 5.0]),
)
def test_a_round_ends_soon_after_the_worst_token_has_its_answers(
    device_TK: list[list[int]], order: list[int], k_min: int, dilation: float
) -> None:
    asked = {device for devices in device_TK for device in devices if device != DROPPED}
    order = [device for device in order if device in asked]
    found = deadlines(device_TK, order, k_min, dilation)
    for count in range(1, len(order) + 1):
        there = order[:count]
        enough = all(
            sum(device in there for device in devices) >= min(k_min, sum(device != DROPPED for device in devices))
            for devices in device_TK
        )
        if not enough:
            assert found[count - 1] == NEVER_NS
        else:
            assert found[count - 1 :] == [int(((count - 1) + AFTER_S * dilation) * 1e9)] * len(found[count - 1 :])
            break


def test_one_answer_per_token_is_enough_where_one_is_asked_for() -> None:
    assert deadlines([[0, 1], [2, 0]], [1, 2, 0], k_min=1) == [NEVER_NS, 1_250_000_000, 1_250_000_000]


def test_a_token_that_was_sent_to_fewer_devices_waits_for_those_only() -> None:
    assert deadlines([[0, 1], [2, DROPPED], [DROPPED, DROPPED]], [0, 1, 2], k_min=2)[1:] == [NEVER_NS, 2_250_000_000]


def test_a_lost_block_is_not_waited_for() -> None:
    pair_and_one = [[0, 1], [2, DROPPED]]
    assert deadlines(pair_and_one, [1, 0, 2], k_min=2, lost=(1,)) == [NEVER_NS, NEVER_NS, 2_250_000_000]
    assert deadlines(pair_and_one, [0, 2, 1], k_min=2, lost=(1,)) == [NEVER_NS, NEVER_NS, 2_250_000_000]
    assert deadlines([[0], [1]], [0, 1], k_min=1, lost=(0,)) == [NEVER_NS, 1_250_000_000]


def test_a_loss_is_no_answer_while_another_can_still_come() -> None:
    assert deadlines([[0, 1]], [0], k_min=1, lost=(0,)) == [NEVER_NS]
    assert deadlines([[0, 1]], [0, 1], k_min=1, lost=(0,)) == [NEVER_NS, 1_250_000_000]


def test_a_block_lost_after_the_last_needed_answer_changes_nothing() -> None:
    assert deadlines([[0, 1]], [0, 1], k_min=1, lost=(1,)) == [250_000_000, 250_000_000]


def test_the_time_after_the_last_needed_answer_is_emulated_time() -> None:
    assert deadlines([[0, 1]], [0], k_min=1, dilation=10) == [2_500_000_000]


def test_the_deadline_of_the_round_is_never_put_off() -> None:
    (block,) = blocks_of([[0]])
    end = EarlyEnd(Deadline(1, AFTER_S), 1.0, [block], 1)
    assert end.deadline_ns(answered(block), 10**9, before_ns=10**9 + 5) == 10**9 + 5


def test_no_time_after_the_last_needed_answer_ends_the_round_at_once() -> None:
    (block,) = blocks_of([[0]])
    assert EarlyEnd(Deadline(1, 0.0), 5.0, [block], 1).deadline_ns(answered(block), 77, NEVER_NS) == 77


def reply(**changed: Any) -> ReplyPart:
    stamps = {"received_ns": 5000, "sent_ns": 5080, **changed}
    return ReplyPart(
        7, 42, 0, 0, 1, 1, 8, 8, "fp32",
        queue_ns=1, dequantise_ns=2, compute_ns=70, padding_ns=3, quantise_ns=4, **stamps,
    )  # fmt: skip


def sent_at(bs_sent_ns: int) -> Outcome:
    (block,) = blocks_of([[0]])
    return Outcome(block, Status.LOST, bs_sent_ns=bs_sent_ns)


def stamps_of(outcome: Outcome) -> tuple[int | None, ...]:
    return outcome.bs_sent_ns, outcome.node_received_ns, outcome.node_sent_ns, outcome.bs_received_ns


def test_a_reply_tells_the_times_of_its_block_by_both_clocks() -> None:
    outcome = sent_at(100)
    note_times(outcome, reply(), 200)
    assert stamps_of(outcome) == (100, 5000, 5080, 200)
    assert (outcome.node_queue_ns, outcome.node_dequantise_ns, outcome.node_quantise_ns) == (1, 2, 4)
    assert (outcome.node_compute_ns, outcome.node_padding_ns) == (73, 3)  # the padding is part of the compute


@pytest.mark.parametrize(
    ("change", "residence_ns"), [({"sent_ns": 4999}, -1), ({"sent_ns": 5101}, 101), ({"received_ns": 0}, 5080)]
)
def test_a_node_cannot_have_had_a_block_for_longer_than_its_round_trip(
    change: dict[str, int], residence_ns: int
) -> None:
    outcome = sent_at(100)
    with pytest.raises(MessageError, match=f"{residence_ns} ns of a round trip of 100 ns"):
        note_times(outcome, reply(**change), 200)
    assert stamps_of(outcome) == (100, None, None, None)  # nothing of it is noted


@given(rtt_ns=st.integers(10**7, 10**13), over_ppm=st.integers(-(10**6), 10**6).filter(lambda ppm: ppm != 1000))
def test_a_nodes_second_may_be_longer_than_ours_by_a_thousandth(rtt_ns: int, over_ppm: int) -> None:
    residence_ns = rtt_ns + rtt_ns * over_ppm // 10**6
    outcome, message = sent_at(100), reply(received_ns=5000, sent_ns=5000 + residence_ns)
    if over_ppm < 1000:
        note_times(outcome, message, 100 + rtt_ns)
        assert stamps_of(outcome) == (100, 5000, 5000 + residence_ns, 100 + rtt_ns)
    else:
        with pytest.raises(MessageError, match="cannot have been the node's"):
            note_times(outcome, message, 100 + rtt_ns)
        assert stamps_of(outcome) == (100, None, None, None)
