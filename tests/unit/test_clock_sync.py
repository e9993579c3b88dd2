from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.latency.clock_sync import ClockReading, Clocks, ClockSync

US, MS, S = 1_000, 1_000_000, 1_000_000_000
HOUR = 3600 * S
TICK_NS = 1  # stamps are whole nanoseconds, and the simulated clocks round down

Stamps = tuple[int, int, int, int]


@dataclass(frozen=True)
class NodeClock:
    """A node's clock as a function of the BS's: what the code under test must never see."""

    offset_ns: int = 0
    drift_ppm: int = 0
    steady_from_ns: int = 0

    def at(self, bs_ns: int) -> int:
        return bs_ns + self.offset_at(bs_ns)

    def offset_at(self, bs_ns: int) -> int:
        return self.offset_ns + self.drift_ppm * (bs_ns - self.steady_from_ns) // 1_000_000


@dataclass(frozen=True)
class Link:
    """One-way times: the least, plus a queue of random length, now and then a burst twenty times as long."""

    down_ns: int = 500 * US
    up_ns: int = 500 * US
    queue_ns: int = 0
    bursts: float = 0.0

    def delay_ns(self, least_ns: int, rng: random.Random) -> int:
        queue_ns = rng.expovariate(1 / self.queue_ns) if self.queue_ns else 0.0
        return least_ns + int(queue_ns * (20 if rng.random() < self.bursts else 1))

    def exchange(self, clock: NodeClock, bs_sent_ns: int, rng: random.Random, residence_ns: int = MS) -> Stamps:
        arrival_ns = bs_sent_ns + self.delay_ns(self.down_ns, rng)
        reply_ns = arrival_ns + int(residence_ns * rng.random())
        back_ns = reply_ns + self.delay_ns(self.up_ns, rng)
        return bs_sent_ns, clock.at(arrival_ns), clock.at(reply_ns), back_ns


def known(reading: ClockReading | None) -> ClockReading:
    assert reading is not None
    return reading


def synced(sync: ClockSync, stamps: Stamps) -> ClockReading:
    sync.exchange(*stamps)
    return known(sync.reading(stamps[3]))


def rounds(
    clock: NodeClock, link: Link, seconds: float, per_s: float, seed: int = 1, start_ns: int = 0
) -> Iterator[Stamps]:
    rng, now_ns = random.Random(seed), start_ns
    while now_ns < start_ns + seconds * S:
        stamps = link.exchange(clock, now_ns, rng)
        yield stamps
        now_ns = stamps[3] + int(rng.uniform(0.5, 1.5) * S / per_s)


clocks = st.builds(
    NodeClock,
    offset_ns=st.integers(-HOUR, HOUR),
    drift_ppm=st.sampled_from([-100, 100, 0]) | st.integers(-100, 100),
    steady_from_ns=st.integers(0, 10**15),
)
links = st.builds(
    Link,
    down_ns=st.sampled_from([0, 20 * US, MS, 10 * MS]),
    up_ns=st.sampled_from([0, 20 * US, MS, 10 * MS]),
    queue_ns=st.sampled_from([0, 10 * US, MS, 30 * MS]),
    bursts=st.sampled_from([0.0, 0.1, 0.5]),
)
gaps_ns = st.lists(st.integers(0, 5 * MS) | st.integers(0, 5 * S) | st.integers(0, 2 * HOUR), min_size=1, max_size=60)


@given(clock=clocks, link=links, gaps_ns=gaps_ns, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_the_true_offset_is_inside_the_interval_at_every_exchange_and_between_them(
    clock: NodeClock, link: Link, gaps_ns: list[int], seed: int
) -> None:
    sync, rng, now_ns = ClockSync(), random.Random(seed), seed
    for gap_ns in gaps_ns:
        if now_ns > seed:  # before this exchange, and after some others
            stale = known(sync.reading(now_ns))
            assert stale.low_ns - TICK_NS <= clock.offset_at(now_ns) <= stale.high_ns + TICK_NS
        stamps = link.exchange(clock, now_ns, rng)
        reading = synced(sync, stamps)
        for asked_ns in (stamps[0], stamps[3]):
            asked = known(sync.reading(asked_ns))
            assert asked.low_ns - TICK_NS <= clock.offset_at(asked_ns) <= asked.high_ns + TICK_NS
        assert reading.low_ns <= reading.offset_ns <= reading.high_ns
        now_ns = stamps[3] + gap_ns
    assert sync.resets == 0 or link.down_ns + link.up_ns == 0


@pytest.mark.parametrize("offset_ns", [-HOUR, HOUR])
@pytest.mark.parametrize("drift_ppm", [-100, 100])
@pytest.mark.parametrize("asymmetry", [(10, 1), (1, 10)], ids=["slow downlink", "slow uplink"])
def test_an_hour_of_offset_a_hundred_ppm_and_ten_to_one_links_stay_inside_over_minutes(
    offset_ns: int, drift_ppm: int, asymmetry: tuple[int, int]
) -> None:
    clock = NodeClock(offset_ns, drift_ppm)
    link = Link(asymmetry[0] * 300 * US, asymmetry[1] * 300 * US, queue_ns=200 * US, bursts=0.1)
    sync = ClockSync()
    for stamps in rounds(clock, link, seconds=150, per_s=10):
        reading = synced(sync, stamps)
        assert reading.low_ns <= clock.offset_at(stamps[3]) <= reading.high_ns
    assert sync.resets == 0
    assert reading.drift_ppm == pytest.approx(drift_ppm, abs=2), "a constant asymmetry does not tilt the drift"
    assert reading.high_ns - reading.low_ns < 1.1 * (link.down_ns + link.up_ns)


@given(clock=clocks, link=links, gaps_ns=gaps_ns, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_past_never_makes_the_interval_wider_than_the_newest_exchange_alone(
    clock: NodeClock, link: Link, gaps_ns: list[int], seed: int
) -> None:
    sync, rng, now_ns = ClockSync(), random.Random(seed), seed
    for gap_ns in gaps_ns:
        stamps = link.exchange(clock, now_ns, rng)
        sync.exchange(*stamps)
        newest = ClockSync()
        newest.exchange(*stamps)
        for asked_ns in (stamps[3], stamps[3] + gap_ns):
            both, alone = known(sync.reading(asked_ns)), known(newest.reading(asked_ns))
            assert alone.low_ns <= both.low_ns
            assert both.high_ns <= alone.high_ns
        now_ns = stamps[3] + gap_ns


def test_the_first_exchange_gives_the_interval_of_its_two_one_way_bounds() -> None:
    sync = Clocks(1, max_drift_ppm=200).of_N[0]
    reading = synced(sync, (0, 700 * US, 900 * US, 500 * US))
    assert reading.low_ns == 400 * US
    assert reading.high_ns == 700 * US + 100, "the downlink's bound is as old as the exchange is long: 500 us"
    assert reading.offset_ns == 550 * US + 50
    assert math.isnan(reading.drift_ppm)
    assert reading.age_ns == 0


@pytest.mark.parametrize(
    ("clock", "link", "per_s", "share"),
    [
        (NodeClock(HOUR, 100), Link(100 * US, 100 * US, queue_ns=50 * US), 100, 0.01),
        (NodeClock(HOUR, -100), Link(100 * US, 100 * US, queue_ns=50 * US), 100, 0.01),
        (NodeClock(-HOUR, -100), Link(MS, MS, queue_ns=MS), 50, 0.02),
        (NodeClock(HOUR, -40), Link(MS, MS, queue_ns=MS, bursts=0.3), 50, 0.02),
        (NodeClock(0, 20), Link(200 * US, 200 * US, queue_ns=50 * US), 2, 0.05),
        (NodeClock(0, 100), Link(100 * US, 100 * US, queue_ns=500 * US), 200, 0.02),
        (NodeClock(0, -100), Link(100 * US, 100 * US, queue_ns=500 * US), 200, 0.02),
    ],
    ids=["wired", "wired, slower", "wireless", "bursts", "heartbeats only", "mostly queue", "mostly queue, slower"],
)
def test_on_symmetric_links_the_guess_is_within_a_few_percent_of_the_least_one_way_delay(
    clock: NodeClock, link: Link, per_s: float, share: float
) -> None:
    for seed in range(3):
        sync, worst_ns, worst_drift_ppm = ClockSync(), 0, 0.0
        for stamps in rounds(clock, link, seconds=60, per_s=per_s, seed=seed):
            reading = synced(sync, stamps)
            if stamps[0] > 30 * S:
                worst_ns = max(worst_ns, abs(reading.offset_ns - clock.offset_at(stamps[3])))
                worst_drift_ppm = max(worst_drift_ppm, abs(reading.drift_ppm - clock.drift_ppm))
        assert worst_ns < share * link.down_ns
        assert worst_drift_ppm < 3


def test_the_drift_stays_unknown_while_delays_scatter_more_than_it_could_move_the_clock() -> None:
    sync, link = ClockSync(), Link(MS, MS, queue_ns=500 * MS)
    for stamps in rounds(NodeClock(drift_ppm=50), link, seconds=20, per_s=2):
        reading = synced(sync, stamps)
        assert math.isnan(reading.drift_ppm)


def test_after_a_pause_the_guess_follows_the_drift() -> None:
    clock, sync = NodeClock(HOUR, 80), ClockSync()
    for stamps in rounds(clock, Link(queue_ns=100 * US), seconds=60, per_s=20):
        sync.exchange(*stamps)
    later_ns = stamps[3] + 60 * S
    reading = known(sync.reading(later_ns))
    assert abs(reading.offset_ns - clock.offset_at(later_ns)) < 200 * US, "60 s at 80 ppm are 4800 us"
    assert reading.bound_ns > 200e-6 * 60 * S


def test_drift_that_changed_during_a_pause_is_corrected_by_the_next_exchange() -> None:
    clock, sync = NodeClock(HOUR, 80), ClockSync()
    for stamps in rounds(clock, Link(queue_ns=100 * US), seconds=60, per_s=20):
        sync.exchange(*stamps)
    changed = NodeClock(clock.offset_at(stamps[3]), 78, stamps[3])
    stamps = Link().exchange(changed, stamps[3] + HOUR, random.Random(0))
    reading = synced(sync, stamps)
    assert abs(reading.offset_ns - changed.offset_at(stamps[3])) < 5 * US, "2 ppm for an hour are 7200 us"


@pytest.mark.parametrize("link", [Link(20 * US, 20 * US, 300 * US), Link(200 * US, 0, 3 * MS)], ids=["even", "uneven"])
def test_the_guess_stays_inside_the_interval_when_the_drift_turns_round(link: Link) -> None:
    for seed in range(10):
        sync, clock, start_ns = ClockSync(), NodeClock(HOUR), 0
        for drift_ppm in (100, -100, 60):
            clock = NodeClock(clock.offset_at(start_ns), drift_ppm, start_ns)
            for stamps in rounds(clock, link, seconds=20, per_s=2, seed=seed + drift_ppm, start_ns=start_ns):
                sync.exchange(*stamps)
                for asked_ns in (stamps[3], stamps[3] + S, stamps[3] + 100 * S):
                    reading = known(sync.reading(asked_ns))
                    assert reading.low_ns <= reading.offset_ns <= reading.high_ns
                    assert reading.low_ns <= clock.offset_at(asked_ns) <= reading.high_ns
            start_ns = stamps[3]


@pytest.mark.parametrize("drift_ppm", [-100, 100])
def test_the_largest_drift_itself_can_be_told(drift_ppm: int) -> None:
    sync = Clocks(1, max_drift_ppm=100).of_N[0]
    for stamps in rounds(NodeClock(0, drift_ppm), Link(queue_ns=50 * US), seconds=30, per_s=20):
        reading = synced(sync, stamps)
    assert sync.resets == 0
    assert reading.drift_ppm == pytest.approx(drift_ppm, abs=1)


def test_drift_that_changes_as_a_board_warms_up_is_followed() -> None:
    sync, rng, link = ClockSync(), random.Random(5), Link(MS, MS, queue_ns=200 * US)
    clock = NodeClock(HOUR, 20)
    for warm_ppm in (20, 21, 22, 23):
        step_ns = (warm_ppm - 20) * 30 * S
        clock = NodeClock(clock.offset_at(step_ns), warm_ppm, step_ns)
        for second in range(0, 30 * 10):
            stamps = link.exchange(clock, step_ns + second * S // 10, rng)
            reading = synced(sync, stamps)
            if step_ns:
                assert abs(reading.offset_ns - clock.offset_at(stamps[3])) < 0.05 * link.down_ns
    assert 21 < reading.drift_ppm <= 23.5


@pytest.mark.parametrize("max_drift_ppm", [50.0, 200.0, 500.0])
def test_a_quiet_hour_widens_the_interval_by_exactly_drift_times_age(max_drift_ppm: float) -> None:
    sync = Clocks(1, max_drift_ppm).of_N[0]
    for stamps in rounds(NodeClock(HOUR, 30), Link(queue_ns=MS), seconds=20, per_s=5):
        before = synced(sync, stamps)
    after = known(sync.reading(stamps[3] + HOUR))
    grown_ns = round(max_drift_ppm * 1e-6 * HOUR)
    assert before.low_ns - after.low_ns == grown_ns
    assert after.high_ns - before.high_ns == grown_ns
    assert after.age_ns == HOUR


@pytest.mark.parametrize("step_ns", [-HOUR, -10 * S, 10 * S, HOUR])
def test_a_step_of_the_clock_is_noticed_and_forgotten_with_the_next_exchange(step_ns: int) -> None:
    clock, link, sync = NodeClock(HOUR, 50), Link(queue_ns=MS), ClockSync()
    for stamps in rounds(clock, link, seconds=30, per_s=10):
        sync.exchange(*stamps)
    stepped = replace(clock, offset_ns=clock.offset_ns + step_ns)
    stamps = link.exchange(stepped, stamps[3] + S, random.Random(0))
    reading, fresh = synced(sync, stamps), synced(ClockSync(), stamps)
    assert reading == fresh
    assert sync.resets == 1
    restart_ns = stamps[3]
    for stamps in rounds(stepped, link, seconds=20, per_s=10, start_ns=restart_ns):
        reading = synced(sync, stamps)
        assert reading.low_ns <= stepped.offset_at(stamps[3]) <= reading.high_ns
    assert sync.resets == 1
    assert reading.drift_ppm == pytest.approx(50, abs=3)


def test_a_machine_suspended_in_mid_exchange_leaves_only_what_came_after() -> None:
    sync = ClockSync()
    for stamps in rounds(NodeClock(), Link(), seconds=5, per_s=10):
        sync.exchange(*stamps)
    slept_ns, now_ns = 60 * S, 6 * S
    sync.exchange(now_ns, now_ns + MS, now_ns + MS + slept_ns, now_ns + 2 * MS)  # the BS's clock stood still
    assert sync.resets == 1
    assert sync.reading(now_ns) is None, "the request was sent before, so only the reply bounds the new offset"
    awake = NodeClock(slept_ns)
    stamps = Link().exchange(awake, now_ns + S, random.Random(0))
    reading = synced(sync, stamps)
    assert reading.low_ns <= slept_ns <= reading.high_ns
    assert sync.resets == 1


def test_drift_beyond_the_largest_is_told_by_resets() -> None:
    sync = Clocks(1, max_drift_ppm=50).of_N[0]
    for stamps in rounds(NodeClock(drift_ppm=400), Link(queue_ns=100 * US), seconds=60, per_s=10):
        sync.exchange(*stamps)
    assert sync.resets > 5


def test_messages_of_the_node_alone_claim_nothing() -> None:
    clock, sync = NodeClock(HOUR, 20), ClockSync()
    for second in range(100):
        sync.one_way_up(clock.at(second * S), second * S + MS)
        assert sync.reading(second * S + MS) is None
    assert sync.resets == 0


def test_messages_of_the_node_alone_sharpen_the_lower_bound_only() -> None:
    clock, sync = NodeClock(HOUR), ClockSync()
    slow = synced(sync, (0, clock.at(MS), clock.at(MS), 50 * MS))
    sync.one_way_up(clock.at(51 * MS), 52 * MS)
    sharp = known(sync.reading(52 * MS))
    assert sharp.low_ns == clock.offset_ns - MS
    assert sharp.low_ns > slow.low_ns
    assert sharp.high_ns == HOUR + MS + 10_400, "the same downlink, 52 ms old at 200 ppm"


def test_messages_of_the_node_alone_after_a_step_withdraw_the_claim_until_the_next_exchange() -> None:
    clock, sync = NodeClock(), ClockSync()
    sync.exchange(*Link().exchange(clock, 0, random.Random(0)))
    stepped = NodeClock(HOUR)
    sync.one_way_up(stepped.at(S), S + MS)
    assert sync.resets == 1
    assert sync.reading(S + MS) is None
    stamps = Link().exchange(stepped, 2 * S, random.Random(0))
    reading = synced(sync, stamps)
    assert reading.low_ns <= HOUR <= reading.high_ns


def test_heartbeats_alone_for_minutes_leave_the_guess_sound() -> None:
    clock, sync = NodeClock(HOUR, 70), ClockSync()
    for stamps in rounds(clock, Link(queue_ns=50 * US), seconds=30, per_s=20):
        sync.exchange(*stamps)
    rng, start_ns = random.Random(7), stamps[3]
    for beat in range(1, 600):
        sent_ns = start_ns + beat * S // 2
        received_ns = sent_ns + 500 * US + int(rng.expovariate(1 / (50 * US)))
        sync.one_way_up(clock.at(sent_ns), received_ns)
        reading = known(sync.reading(received_ns))
        assert reading.low_ns <= clock.offset_at(received_ns) <= reading.high_ns
    assert reading.drift_ppm == pytest.approx(70, abs=3)
    assert abs(reading.offset_ns - clock.offset_at(received_ns)) < MS


def test_stamps_that_come_late_count_as_if_they_had_come_in_time() -> None:
    clock, link, rng = NodeClock(HOUR, -60), Link(queue_ns=500 * US), random.Random(3)
    in_time, late, now_ns = ClockSync(), ClockSync(), 0
    for _ in range(200):
        burst = [link.exchange(clock, now_ns + i * S, rng) for i in range(8)]
        newest_ns = max(stamps[3] for stamps in burst)
        for stamps in burst:
            in_time.exchange(*stamps)
        for stamps in rng.sample(burst, len(burst)):
            late.exchange(*stamps)
        expected, reading = known(in_time.reading(newest_ns)), known(late.reading(newest_ns))
        assert reading.low_ns == pytest.approx(expected.low_ns, abs=TICK_NS)
        assert reading.high_ns == pytest.approx(expected.high_ns, abs=TICK_NS)
        assert reading.age_ns == 0
        now_ns += 8 * S
    assert late.resets == 0
    assert reading.drift_ppm == pytest.approx(-60, abs=5)


def test_a_reset_forgets_everything_and_is_not_counted() -> None:
    sync = ClockSync()
    for stamps in rounds(NodeClock(HOUR, 50), Link(), seconds=20, per_s=10):
        sync.exchange(*stamps)
    sync.reset()
    assert sync.reading(stamps[3]) is None
    later = Link().exchange(NodeClock(-HOUR), stamps[3] + S, random.Random(0))
    assert synced(sync, later) == synced(ClockSync(), later)
    assert sync.resets == 0


@pytest.mark.parametrize("stamps", [(10, 50, 60, 9), (10, 50, 49, 20)], ids=["BS", "node"])
def test_a_clock_that_ran_backwards_is_refused_and_changes_nothing(stamps: Stamps) -> None:
    sync = ClockSync()
    before = synced(sync, (0, 100 * US, 100 * US, 200 * US))
    with pytest.raises(ValueError, match=r"a reply before its request, .*: BS sent 10"):
        sync.exchange(*stamps)
    assert sync.reading(200 * US) == before


@given(stamps=st.lists(st.tuples(*[st.integers(-(2**63), 2**63)] * 4), max_size=40))
@settings(deadline=None)
def test_absurd_stamps_end_in_a_reading_or_a_refusal(stamps: list[Stamps]) -> None:
    sync = ClockSync()
    for one in stamps:
        try:
            sync.exchange(*one)
        except ValueError:
            continue
        reading = sync.reading(one[3])
        assert reading is None or reading.low_ns <= reading.offset_ns <= reading.high_ns


@pytest.mark.parametrize(("max_drift_ppm", "memory"), [(0.0, 32), (math.nan, 32), (1e6, 32), (200.0, 3)])
def test_impossible_settings_are_refused(max_drift_ppm: float, memory: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Clocks(1, max_drift_ppm, memory)


@given(clock=clocks, link=links, residence_ns=st.sampled_from([0, MS, 20 * S]), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_true_one_way_times_are_within_the_bound(clock: NodeClock, link: Link, residence_ns: int, seed: int) -> None:
    sync, rng, now_ns = Clocks(1, max_drift_ppm=100).of_N[0], random.Random(seed), seed
    for _ in range(20):
        stamps = link.exchange(clock, now_ns, rng, residence_ns)
        sync.exchange(*stamps)
        times = sync.one_way_times(*stamps)
        if times is None:  # without any delay a nanosecond's rounding is a contradiction
            assert link.down_ns + link.up_ns == 0
            continue
        assert abs(times.down_ns - (stamps[1] - clock.at(stamps[0]))) <= times.bound_ns + TICK_NS
        assert abs(times.up_ns - (clock.at(stamps[3]) - stamps[2])) <= times.bound_ns + TICK_NS
        assert min(times.down_ns, times.up_ns) >= 0
        assert times.offset_ns == known(sync.reading(stamps[3])).offset_ns
        now_ns = stamps[3] + int(S * rng.random())


def test_one_way_times_of_a_long_computation_are_not_moved_by_the_drift_meanwhile() -> None:
    clock, sync = NodeClock(-HOUR, 100), ClockSync()
    for stamps in rounds(clock, Link(queue_ns=20 * US), seconds=60, per_s=10):
        sync.exchange(*stamps)
    sent_ns = stamps[3] + S
    arrived_ns, replied_ns = sent_ns + 600 * US, sent_ns + 20 * S
    long = (sent_ns, clock.at(arrived_ns), clock.at(replied_ns), replied_ns + 700 * US)
    sync.exchange(*long)
    times = sync.one_way_times(*long)
    assert times is not None
    assert times.down_ns == pytest.approx(600 * US, abs=30 * US), "20 s at 100 ppm are 2000 us"
    assert times.up_ns == pytest.approx(700 * US, abs=30 * US)
    assert times.bound_ns > 2000 * US


def test_one_way_times_of_a_long_computation_tell_how_old_the_offset_of_its_start_is() -> None:
    clock, sync = NodeClock(0, 100), Clocks(1, max_drift_ppm=100).of_N[0]
    sync.exchange(*Link().exchange(clock, 20 * S, random.Random(0)))  # a heartbeat, echoed while the node computed
    long = (0, clock.at(5 * MS), clock.at(20 * S + 5 * MS), 20 * S + 10 * MS)
    sync.exchange(*long)
    times = sync.one_way_times(*long)
    assert times is not None
    assert abs(times.down_ns - 5 * MS) > MS
    assert abs(times.down_ns - 5 * MS) <= times.bound_ns


def test_one_way_times_tell_a_slow_block_from_a_quick_link_once_small_messages_were_seen() -> None:
    clock, sync = NodeClock(HOUR, 30), ClockSync()
    assert sync.one_way_times(0, clock.at(MS), clock.at(MS), 2 * MS) is None
    for stamps in rounds(clock, Link(queue_ns=20 * US), seconds=20, per_s=10):
        sync.exchange(*stamps)
    block = Link(down_ns=40 * MS, up_ns=10 * MS).exchange(clock, stamps[3] + S, random.Random(0))
    sync.exchange(*block)
    times = sync.one_way_times(*block)
    assert times is not None
    assert times.down_ns == pytest.approx(40 * MS, rel=0.01)
    assert times.up_ns == pytest.approx(10 * MS, rel=0.01)
    assert times.bound_ns < MS + 200 * US, "half a quick round trip, and a second of drift: not half of the block's"
