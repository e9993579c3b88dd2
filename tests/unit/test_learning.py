from __future__ import annotations

from dataclasses import replace
from time import monotonic_ns

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_node.blocks import Block, Outcome
from bs_node.late import LateReplies
from bs_node.learning import Learning
from bs_node.registry import Node
from bs_node.station import Mail
from testbed.latency.estimator import Estimator
from testbed.runlog.schema import Status
from testbed.wire.messages import ReplyPart

ROW_BYTES, HEADER_BYTES, ROWS = 1000, 100, 8
BLOCK_BYTES = ROWS * ROW_BYTES + HEADER_BYTES
MS = 1_000_000
DRIFT = 1e-3  # clocks that may drift by 200 ppm leave one-way times that uncertain
HOUR_NS = 3600 * 10**9


def learning_of(devices: int = 2) -> tuple[Learning, Estimator, list[Node]]:
    estimator = Estimator(devices, ROW_BYTES, ROW_BYTES, header_bytes=HEADER_BYTES)
    nodes = [Node(device, f"jetson-{device}") for device in range(devices)]
    return Learning(estimator, nodes), estimator, nodes


def outcome_of(
    status: Status = Status.ANSWERED,
    device: int = 0,
    sent_ns: int = 10**9,
    down_ns: int = 10 * MS,
    residence_ns: int = 40 * MS,
    up_ns: int = 30 * MS,
    offset_ns: int = 0,
    dilation: float = 1.0,
) -> Outcome:
    """Eight rows for two experts and back, as both clocks stamp it; the node's is `offset_ns` ahead."""
    rows_R = np.arange(ROWS)
    outcome = Outcome(Block(device, rows_R, 0 * rows_R, [(0, 5), (1, 3)]), status, bs_sent_ns=sent_ns)
    outcome.bytes_down = outcome.bytes_up = BLOCK_BYTES
    outcome.dilation = dilation
    if status is Status.ANSWERED:
        outcome.node_received_ns = sent_ns + down_ns + offset_ns
        outcome.node_sent_ns = outcome.node_received_ns + residence_ns
        outcome.bs_received_ns = sent_ns + down_ns + residence_ns + up_ns
    return outcome


def predicted(estimator: Estimator, device: int = 0) -> tuple[float, float]:
    """Compute and link of the same block."""
    compute_s, down_s, up_s = estimator.predict(device, ROWS, 2, BLOCK_BYTES, BLOCK_BYTES)
    return compute_s, down_s + up_s


def test_a_block_teaches_what_node_and_link_took() -> None:
    learning, estimator, _ = learning_of()
    learning.answered([outcome_of()])
    assert predicted(estimator) == pytest.approx((0.040, 0.040), rel=DRIFT)
    assert estimator.lessons_N.tolist() == [1, 0]


@pytest.mark.parametrize("dilation", [5.0, 10.0])
def test_what_is_learnt_is_in_seconds_of_the_emulated_world(dilation: float) -> None:
    (undilated, as_it_is, _), (dilated, stretched, _) = learning_of(), learning_of()
    rng = np.random.default_rng(0)
    for number in range(20):
        down_ns, residence_ns, up_ns = (int(ms * MS) for ms in rng.uniform(10, 50, 3))
        undilated.answered([outcome_of(Status.ANSWERED, 0, number * 10**9, down_ns, residence_ns, up_ns)])
        times_ns = (int(time_ns * dilation) for time_ns in (down_ns, residence_ns, up_ns))
        dilated.answered([outcome_of(Status.ANSWERED, 0, number * 10**9, *times_ns, dilation=dilation)])
    assert predicted(stretched) == pytest.approx(predicted(as_it_is), rel=0.02)


TIME_NS = st.integers(0, 10**9)


@given(
    times=st.lists(st.tuples(TIME_NS, TIME_NS, TIME_NS), min_size=1, max_size=6),
    offset_ns=st.integers(-HOUR_NS, HOUR_NS),
    dilation=st.sampled_from([1.0, 5.0]),
)
def test_one_way_times_stay_within_the_links_time_and_the_truth_within_their_bound(
    times: list[tuple[int, int, int]], offset_ns: int, dilation: float
) -> None:
    learning, _, _ = learning_of()
    for number, (down_ns, residence_ns, up_ns) in enumerate(times):
        sent_ns = 2 * HOUR_NS + number * 10**10
        outcome = outcome_of(Status.ANSWERED, 0, sent_ns, down_ns, residence_ns, up_ns, offset_ns, dilation)
        learning.answered([outcome])
        assert outcome.down_ns is not None
        assert outcome.up_ns is not None
        assert outcome.clock_offset_ns is not None
        assert outcome.clock_bound_ns is not None
        assert 0 <= outcome.down_ns <= max(down_ns + up_ns, 1)
        assert 0 <= outcome.up_ns <= max(down_ns + up_ns, 1)
        assert outcome.down_ns + outcome.up_ns <= max(down_ns + up_ns, 1)
        assert abs(outcome.clock_offset_ns - offset_ns) <= outcome.clock_bound_ns
        assert abs(outcome.down_ns - down_ns) <= outcome.clock_bound_ns + 1
        assert abs(outcome.up_ns - up_ns) <= outcome.clock_bound_ns + 1


def test_both_ways_together_take_what_the_link_took_however_long_the_node_had_the_block() -> None:
    learning, estimator, _ = learning_of()
    outcome = outcome_of(down_ns=MS, residence_ns=10 * 10**9, up_ns=MS)
    learning.answered([outcome])
    both_ns = (outcome.down_ns or 0) + (outcome.up_ns or 0)
    assert both_ns == pytest.approx(2 * MS, rel=DRIFT)
    assert both_ns <= 2 * MS
    assert predicted(estimator)[1] == pytest.approx(0.002, rel=0.01)


@pytest.mark.parametrize("over_ppm", [100, 1000])
def test_a_node_whose_second_is_longer_than_ours_leaves_the_link_next_to_nothing_and_never_less(over_ppm: int) -> None:
    learning, estimator, _ = learning_of()
    over_ns = over_ppm * 1000  # of a round trip of one second
    outcome = outcome_of(down_ns=0, residence_ns=10**9 + over_ns, up_ns=-over_ns)
    learning.answered([outcome])
    assert (outcome.down_ns or 0, outcome.up_ns or 0) in [(0, 0), (0, 1), (1, 0)]
    assert predicted(estimator)[1] == pytest.approx(0, abs=1e-8)
    assert estimator.lessons_N[0] == 1


def test_a_clock_known_from_quicker_messages_tells_the_directions_apart() -> None:
    learning, estimator, nodes = learning_of()
    nodes[0].clock.exchange(10**9, 10**9 + HOUR_NS, 10**9 + HOUR_NS, 10**9 + 2)  # an echo that took no time
    outcome = outcome_of(sent_ns=10**9 + 100, offset_ns=HOUR_NS)
    learning.answered([outcome])
    assert outcome.down_ns == pytest.approx(10 * MS, rel=0.01)
    assert outcome.up_ns == pytest.approx(30 * MS, rel=0.01)
    _, down_s, up_s = estimator.predict(0, ROWS, 2, BLOCK_BYTES, BLOCK_BYTES)
    assert (down_s, up_s) == pytest.approx((0.010, 0.030), rel=0.01)


def test_a_block_compares_the_clock_of_its_own_node_only() -> None:
    learning, _, nodes = learning_of()
    learning.answered([outcome_of(device=1)])
    assert nodes[0].clock.reading(10**9) is None
    assert nodes[1].clock.reading(10**9) is not None


def test_a_reply_that_took_no_time_on_the_link_still_teaches() -> None:
    learning, estimator, _ = learning_of()
    learning.answered([outcome_of(down_ns=0, residence_ns=0, up_ns=0)])
    assert estimator.lessons_N[0] == 1


def test_an_outcome_without_stamps_teaches_nothing() -> None:
    learning, estimator, _ = learning_of()
    outcome = replace(outcome_of(), bs_sent_ns=None)  # experts in this process: there was no wire
    learning.answered([outcome])
    assert estimator.lessons_N.tolist() == [0, 0]
    assert (outcome.down_ns, outcome.clock_offset_ns) == (None, None)


def test_a_late_reply_teaches_as_one_in_time_does() -> None:
    learning, estimator, nodes = learning_of()
    late, whole = LateReplies(), outcome_of()
    late.expect(3, replace(outcome_of(Status.LATE), bytes_up=0))
    reply = ReplyPart(
        7, 3, 0, 0, 1, ROWS, 8, 8, "fp32", whole.node_received_ns or 0, whole.node_sent_ns or 0, 0, 0, 0, 0, 0
    )
    payload = memoryview(bytes(BLOCK_BYTES - 60))
    late.take(Mail(nodes[0], reply, payload, 60), whole.bs_received_ns or 0)
    learning.answered(late.collect())
    assert predicted(estimator) == pytest.approx((0.040, 0.040), rel=DRIFT)
    assert estimator.lessons_N.tolist() == [1, 0]


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("dilation", [1.0, 4.0])
def test_a_missed_reply_raises_the_estimate_to_at_least_the_wait(taught: bool, dilation: float) -> None:
    learning, estimator, _ = learning_of()
    if taught:
        learning.answered([outcome_of(dilation=dilation)])
    waited_ns = 20 * 10**9
    learning.missed(outcome_of(Status.LATE, sent_ns=monotonic_ns() - waited_ns, dilation=dilation))
    now_s = monotonic_ns() / 1e9
    state = estimator.state(0, np.ones(2, bool), now_s)
    cost_s = state.cost_s_N(np.array([ROWS, 0]), np.array([2, 0]))[0]
    assert waited_ns / 1e9 / dilation <= cost_s * (1 + 1e-9)
    assert cost_s < 2 * waited_ns / 1e9 / dilation  # a machine that stops for 20 s between two lines would be too slow
    assert 0 <= state.age_s_N[0] < 20
    assert np.isnan(state.token_s_N[1])


def test_a_miss_never_lowers_an_estimate() -> None:
    learning, estimator, _ = learning_of()
    learning.answered([outcome_of(residence_ns=50 * 10**9)])
    before = sum(predicted(estimator))
    learning.missed(outcome_of(Status.LATE, sent_ns=monotonic_ns() - 10**9))
    assert sum(predicted(estimator)) == pytest.approx(before)


def test_the_reply_that_comes_after_a_miss_says_how_slow_it_really_was() -> None:
    learning, estimator, _ = learning_of()
    learning.answered([outcome_of()])
    learning.missed(outcome_of(Status.LATE, sent_ns=monotonic_ns() - 20 * 10**9))
    learning.answered([outcome_of(sent_ns=2 * 10**9)])
    assert sum(predicted(estimator)) == pytest.approx(0.080, rel=0.05)


@pytest.mark.parametrize("status", [Status.LOST, Status.REJECTED, Status.INVALID])
def test_a_device_that_went_away_refused_or_broke_the_rules_teaches_nothing(status: Status) -> None:
    learning, estimator, _ = learning_of()
    learning.missed(outcome_of(status, sent_ns=monotonic_ns() - 10**9))
    state = estimator.state(0, np.ones(2, bool), monotonic_ns() / 1e9)
    assert np.isnan(state.token_s_N).all()
    assert np.isnan(state.age_s_N).all()


def test_a_block_that_never_left_teaches_nothing() -> None:
    learning, estimator, _ = learning_of()
    learning.missed(replace(outcome_of(Status.LATE), bs_sent_ns=None))
    assert np.isnan(estimator.ages(1.0)).all()


# --- under shares of the band ---


def under_shares(outcome: Outcome, *air_ratio: float) -> Outcome:
    return replace(outcome, air_ratio=air_ratio)


@given(down_ratio=st.floats(0.05, 8), up_ratio=st.floats(0.05, 8))
def test_times_under_a_share_teach_those_at_the_even_split(down_ratio: float, up_ratio: float) -> None:
    """A link twice as fast took half as long: both tell the same of a row, sizes of blocks being told apart."""
    (even, at_even, nodes), (shared, restated, others) = learning_of(), learning_of()
    for number in range(12):
        rows, sent_ns = (number % 4 + 1) * ROWS, 10**9 + number * 10**8
        for learning, ratios in ((even, (1.0, 1.0)), (shared, (down_ratio, up_ratio))):
            for node in (*nodes, *others):
                node.clock.exchange(sent_ns - 3, sent_ns - 2, sent_ns - 2, sent_ns - 1)
            down_ns, up_ns = (int(rows * MS / ratio) for ratio in ratios)
            outcome = outcome_of(sent_ns=sent_ns, down_ns=down_ns, up_ns=up_ns)
            outcome.block = Block(0, np.arange(rows), np.zeros(rows, int), [(0, rows)])
            outcome.bytes_down = outcome.bytes_up = rows * ROW_BYTES
            learning.answered([under_shares(outcome, *ratios)])
    np.testing.assert_allclose(restated.air_row_s_WN()[:, 0], at_even.air_row_s_WN()[:, 0], rtol=0.05)


def test_what_was_expected_of_a_block_is_by_its_own_share() -> None:
    learning, _, _ = learning_of()
    learning.answered([outcome_of()])
    one, other = (under_shares(outcome_of(sent_ns=2 * 10**9), *ratio) for ratio in ((1.0, 1.0), (0.5, 2.0)))
    learning.answered([one, other])
    assert one.predicted is not None
    assert other.predicted is not None
    assert other.predicted[1] > 1.5 * one.predicted[1]
    assert other.predicted[2] < 0.7 * one.predicted[2]


def test_several_blocks_at_once_teach_what_they_teach_one_by_one() -> None:
    (together, batch, _), (apart, singly, _) = learning_of(), learning_of()
    outcomes = [
        under_shares(outcome_of(device=device, sent_ns=10**9 + 10**8 * number, down_ns=(5 + number) * MS), 2.0, 0.5)
        for number in range(6)
        for device in (number % 2, 1 - number % 2)
    ]
    copies = [replace(outcome) for outcome in outcomes]
    together.answered(outcomes)
    for copy in copies:
        apart.answered([copy])
    for device in range(2):
        assert batch.predict(device, ROWS, 2, 100, 100) == singly.predict(device, ROWS, 2, 100, 100)
    for outcome, copy in zip(outcomes, copies, strict=True):
        np.testing.assert_array_equal(outcome.predicted, copy.predicted)
        facts = [(o.down_ns, o.up_ns, o.clock_offset_ns, o.clock_bound_ns) for o in (outcome, copy)]
        assert facts[0] == facts[1]


def test_no_block_teaches_nothing() -> None:
    learning, estimator, _ = learning_of()
    learning.answered([])
    learning.answered([replace(outcome_of(), bs_received_ns=None)])
    assert estimator.lessons_N.tolist() == [0, 0]
