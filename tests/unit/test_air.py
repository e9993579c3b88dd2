"""When pieces are transmitted and due: by example, and for any order of events."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.channel.air import Air, Lane, Link, Piece, make_links
from testbed.errors import ConfigError

MBIT_PER_S = 1e6
KB_AT_8_MBIT_NS = 1e6  # 1000 bytes at 8 Mbit/s take a millisecond


def lane(air: Air, bits_per_s: float = 8 * MBIT_PER_S, delay_ns: float = 0.0) -> Lane[Piece]:
    link = Link(air)
    link.tune(bits_per_s, delay_ns, 0.0)
    return Lane(link)


def offer(lane: Lane[Piece], now_ns: float, size_bytes: int = 1000) -> Piece:
    piece = Piece(size_bytes)
    lane.offer(piece, now_ns)
    return piece


def times(piece: Piece) -> tuple[float, float, float]:
    return piece.begin_ns, piece.end_ns, piece.due_ns


def test_a_piece_begins_when_it_arrives_and_is_due_its_air_time_and_the_delay_later() -> None:
    air = Air()
    piece = offer(lane(air, delay_ns=300.0), 50.0)
    air.advance(50.0)
    assert times(piece) == (50.0, 50.0 + KB_AT_8_MBIT_NS, 350.0 + KB_AT_8_MBIT_NS)


def test_the_delay_holds_nobody_up() -> None:
    air = Air()
    link = lane(air, delay_ns=1e9)
    pieces = [offer(link, 0.0) for _ in range(3)]
    air.advance(1e9)
    assert [piece.due_ns - 1e9 for piece in pieces] == [1e6, 2e6, 3e6]


def test_an_untuned_link_takes_no_time() -> None:
    air = Air()
    piece = offer(Lane(Link(air)), 7.0, 10**6)
    air.advance(7.0)
    assert times(piece) == (7.0, 7.0, 7.0)


def test_lanes_on_the_same_air_take_turns() -> None:
    air = Air()
    first, second = lane(air), lane(air, 4 * MBIT_PER_S)
    ours = [offer(first, 0.0) for _ in range(3)]
    theirs = [offer(second, 10.0) for _ in range(2)]
    air.advance(1e9)
    assert [piece.begin_ns for piece in ours] == [0.0, 1e6, 4e6], "the first two came while nobody else was there"
    assert [piece.begin_ns for piece in theirs] == [2e6, 5e6], "each at its own rate while it is on"


def test_a_new_rate_is_for_what_has_not_begun() -> None:
    air = Air()
    link = lane(air)
    begun, waiting = offer(link, 0.0), offer(link, 0.0)
    link.link.tune(80 * MBIT_PER_S, 0.0, 5e5)
    air.advance(1e9)
    assert (begun.air_ns, waiting.air_ns) == (1e6, 1e5)
    assert (begun.end_ns, waiting.begin_ns) == (1e6, 1e6)


def test_a_shorter_delay_does_not_let_bytes_overtake() -> None:
    air = Air()
    link = lane(air, delay_ns=1e9)
    early = offer(link, 0.0)
    link.link.tune(8 * MBIT_PER_S, 0.0, 1.0)
    late = offer(link, 2.0)
    air.advance(1e9)
    assert late.due_ns == early.due_ns


def test_a_held_lane_leaves_the_air_to_others_and_goes_on_when_resumed() -> None:
    air = Air()
    held, other = lane(air), lane(air)
    before, during = offer(held, 0.0), offer(held, 0.0)
    held.hold(10.0)
    offered_while_held = offer(held, 20.0)
    theirs = offer(other, 30.0)
    held.resume(5e6)
    air.advance(1e9)
    assert [piece.begin_ns for piece in (before, theirs, during, offered_while_held)] == [0.0, 1e6, 5e6, 6e6]


def test_a_cleared_lane_is_forgotten() -> None:
    air = Air()
    gone, other = lane(air), lane(air)
    for _ in range(5):
        offer(gone, 0.0)
    gone.clear(0.0)
    piece = offer(other, 0.0)
    air.advance(1e9)
    assert piece.begin_ns == KB_AT_8_MBIT_NS, "only what had begun still occupies the air"
    assert not gone.flying
    assert air.wake_ns() == math.inf


@pytest.mark.parametrize(("medium", "airs"), [("fdd", 4), ("tdd", 2), ("shared", 1)])
def test_media_differ_in_who_shares_the_air(medium: str, airs: int) -> None:
    links = make_links(medium, ["near", "far"])
    assert len({link.air for pair in links for link in pair}) == airs
    assert (links[0][0].air is links[0][1].air) == (medium != "fdd")


def test_another_medium_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^medium = 'radio': not one of fdd, tdd, shared$"):
        make_links("radio", ["near"])


class Arrival(NamedTuple):
    after_ns: float
    lane: int
    size_bytes: int
    bits_per_s: float | None  # a new rate for the lane just before
    delay_ns: float


LANES = 3
SIZES = st.lists(st.integers(1, 8192), min_size=1, max_size=30)
RATES = st.sampled_from([1e6, 3e6, 20e6, 1e9])
ARRIVALS = st.lists(
    st.builds(
        Arrival,
        after_ns=st.sampled_from([0.0, 1.0, 1e4, 3e6]),
        lane=st.integers(0, LANES - 1),
        size_bytes=st.integers(1, 8192),
        bits_per_s=st.none() | RATES,
        delay_ns=st.sampled_from([0.0, 1e5, 5e6]),
    ),
    min_size=1,
    max_size=40,
)


class Sent(NamedTuple):
    piece: Piece
    lane: int
    arrived_ns: float


def play(arrivals: list[Arrival], look_every_ns: float) -> list[Sent]:
    """Let all arrive, with the air looked at now and then in between; checks that nothing is due before it is said."""
    air = Air()
    lanes = [lane(air) for _ in range(LANES)]
    now_ns, sent = 0.0, []

    def look(until_ns: float) -> None:
        wake_ns = air.wake_ns()
        begun = sum(len(lane.flying) for lane in lanes)
        air.advance(until_ns)
        new = sorted((piece for lane in lanes for piece in lane.flying), key=lambda piece: piece.begin_ns)[begun:]
        assert all(piece.due_ns >= wake_ns for piece in new)

    for arrival in arrivals:
        if arrival.after_ns > look_every_ns:
            look(now_ns + look_every_ns)
        now_ns += arrival.after_ns
        look(now_ns)
        if arrival.bits_per_s is not None:
            lanes[arrival.lane].link.tune(arrival.bits_per_s, arrival.delay_ns, now_ns)
        sent.append(Sent(offer(lanes[arrival.lane], now_ns, arrival.size_bytes), arrival.lane, now_ns))
    look(now_ns + 1e12)
    return sent


@given(ARRIVALS)
def test_everything_is_transmitted_once_in_order_and_never_two_at_a_time(arrivals: list[Arrival]) -> None:
    sent = play(arrivals, math.inf)
    for number in range(LANES):
        of_lane = [piece for piece, lane, _ in sent if lane == number]
        assert all(a.end_ns <= b.begin_ns and a.due_ns <= b.due_ns for a, b in pairwise(of_lane))
    on_air = sorted((piece for piece, _, _ in sent), key=lambda piece: piece.begin_ns)
    assert all(a.end_ns <= b.begin_ns for a, b in pairwise(on_air))
    for piece, _, arrived_ns in sent:
        assert piece.begin_ns >= arrived_ns
        assert piece.end_ns == piece.begin_ns + piece.air_ns


@given(ARRIVALS)
def test_the_air_is_never_idle_while_something_waits(arrivals: list[Arrival]) -> None:
    sent = play(arrivals, math.inf)
    ends = {piece.end_ns for piece, _, _ in sent}
    assert all(piece.begin_ns == arrived_ns or piece.begin_ns in ends for piece, _, arrived_ns in sent)


@given(ARRIVALS, st.sampled_from([1.0, 1e3, 1e6]))
def test_when_one_looks_changes_nothing(arrivals: list[Arrival], look_every_ns: float) -> None:
    often, seldom = play(arrivals, look_every_ns), play(arrivals, math.inf)
    assert [times(sent.piece) for sent in often] == [times(sent.piece) for sent in seldom]


@given(SIZES, SIZES)
def test_while_two_lanes_wait_neither_gets_two_turns_in_a_row(ours: list[int], theirs: list[int]) -> None:
    air = Air()
    offer(lane(air), 0.0)  # so that all of theirs wait
    lanes = lane(air), lane(air)
    for number, sizes in enumerate((ours, theirs)):
        for size_bytes in sizes:
            offer(lanes[number], 0.0, size_bytes)
    air.advance(1e15)
    turns = sorted((piece.begin_ns, number) for number in (0, 1) for piece in lanes[number].flying)
    both_wait = 2 * min(len(ours), len(theirs))
    assert [number for _, number in turns[:both_wait]] == [0, 1] * (both_wait // 2)
