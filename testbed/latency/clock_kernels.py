"""The compiled part of comparing clocks: bounds in, bounds out, integer nanoseconds throughout.

D: the direction that a bound comes from, uplink messages (of the offset) and downlink messages (of its negative).
K: the strongest bound of all; the strongest of the window under way; the strongest of the windows before, along the
drift. Each bound is a value and the BS time at which the quantity was at least that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import inlined, native, read, write

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UP, DOWN = 0, 1
HARD, WINDOW, BEFORE = 0, 1, 2
VALUE, AT = 0, 1
WINDOW_END, NEWEST, RESETS, MAX_DRIFT_PPB, FACTS = 0, 1, 2, 3, 4
NOTHING = np.iinfo(np.int64).min
SECOND_NS = 1_000_000_000
LATEST_NS = 2**60  # 36 years of a monotonic clock: sums of stamps and of drift cannot overflow


@inlined
def at_least(bound: Any, when_ns: Any, max_drift_ppb: Any) -> Any:
    """What a bound still says at another time, whatever the clocks did between: rounded outwards."""
    gap_ns = abs(when_ns - bound[AT])
    whole, rest = gap_ns // SECOND_NS, gap_ns % SECOND_NS  # apart, so that a day of drift does not overflow
    return bound[VALUE] - whole * max_drift_ppb - (rest * max_drift_ppb + SECOND_NS - 1) // SECOND_NS


@inlined
def likely(bound: Any, when_ns: Any, drift: Any) -> Any:
    """What it says if the drift was as estimated."""
    return bound[VALUE] + np.int64(np.rint(drift * (when_ns - bound[AT])))


@inlined
def contradict(value_ns: Any, at_ns: Any, opposite: Any, max_drift_ppb: Any) -> Any:
    """Whether a quantity and its negative cannot both be that large."""
    return opposite[VALUE] != NOTHING and value_ns + at_least(opposite, at_ns, max_drift_ppb) > 0


@inlined
def forget(bound_DK2: Any, facts_F: Any) -> Any:
    bound_DK2[:, :, VALUE] = NOTHING
    facts_F[WINDOW_END], facts_F[NEWEST] = NOTHING, 0


@inlined
def learn_bound(bound_K2: Any, value_ns: Any, at_ns: Any, drift: Any, max_drift_ppb: Any) -> Any:
    hard, window = bound_K2[HARD], bound_K2[WINDOW]
    stronger = hard[VALUE] == NOTHING
    if not stronger and at_ns >= hard[AT]:
        stronger = value_ns >= at_least(hard, at_ns, max_drift_ppb)
    elif not stronger:
        stronger = at_least((value_ns, at_ns), hard[AT], max_drift_ppb) >= hard[VALUE]
    if stronger:
        hard[VALUE], hard[AT] = value_ns, at_ns
    if window[VALUE] == NOTHING or value_ns >= likely(window, at_ns, drift):
        window[VALUE], window[AT] = value_ns, at_ns


@inlined
def must_turn(bound_DK2: Any, facts_F: Any, now_ns: Any) -> Any:
    """Whether the window is at its end, and has heard both directions: one alone tells no drift."""
    over = facts_F[WINDOW_END] != NOTHING and now_ns >= facts_F[WINDOW_END]
    return over and bound_DK2[UP, WINDOW, VALUE] != NOTHING and bound_DK2[DOWN, WINDOW, VALUE] != NOTHING


@inlined
def learn(bound_DK2: Any, facts_F: Any, drift: Any, up: Any, down: Any, window_ns: Any) -> Any:
    """Learn from a message up and, unless its value is NOTHING, one down. False where the window must turn first."""
    most, heard_down = facts_F[MAX_DRIFT_PPB], down[VALUE] != NOTHING
    stepped_between = heard_down and contradict(up[VALUE], up[AT], down, most)
    if (
        stepped_between
        or contradict(up[VALUE], up[AT], bound_DK2[DOWN, HARD], most)
        or (heard_down and contradict(down[VALUE], down[AT], bound_DK2[UP, HARD], most))
    ):
        forget(bound_DK2, facts_F)
        facts_F[RESETS] += 1
    if must_turn(bound_DK2, facts_F, up[AT]):
        return False
    if facts_F[WINDOW_END] == NOTHING:
        facts_F[WINDOW_END] = up[AT] + window_ns
    along = drift if bound_DK2[UP, BEFORE, VALUE] != NOTHING else 0.0
    learn_bound(bound_DK2[UP], up[VALUE], up[AT], along, most)
    if heard_down and not stepped_between:
        learn_bound(bound_DK2[DOWN], down[VALUE], down[AT], -along, most)
    facts_F[NEWEST] = max(facts_F[NEWEST], up[AT])
    return True


@inlined
def likely_floor(bound_K2: Any, when_ns: Any, drift: Any) -> Any:
    """Where the floor should be, by the window under way and the best of those before."""
    before = likely(bound_K2[BEFORE], when_ns, drift)
    return before if bound_K2[WINDOW, VALUE] == NOTHING else max(before, likely(bound_K2[WINDOW], when_ns, drift))


@inlined
def read_offset(bound_DK2: Any, max_drift_ppb: Any, drift: Any, when_ns: Any) -> Any:
    """(guess, lowest, highest) of the offset at a BS time; both directions must have been heard."""
    low_ns = at_least(bound_DK2[UP, HARD], when_ns, max_drift_ppb)
    high_ns = -at_least(bound_DK2[DOWN, HARD], when_ns, max_drift_ppb)
    guess_ns = (low_ns + high_ns) // 2
    if bound_DK2[UP, BEFORE, VALUE] != NOTHING:
        likely_low_ns = likely_floor(bound_DK2[UP], when_ns, drift)
        likely_high_ns = -likely_floor(bound_DK2[DOWN], when_ns, -drift)
        if likely_low_ns <= likely_high_ns:  # or else the drift was not steady
            guess_ns = min(max((likely_low_ns + likely_high_ns) // 2, low_ns), high_ns)
    return guess_ns, low_ns, high_ns


@inlined
def heard_both(bound_DK2: Any) -> Any:
    return bound_DK2[UP, HARD, VALUE] != NOTHING and bound_DK2[DOWN, HARD, VALUE] != NOTHING


@inlined
def read_ways(bound_DK2: Any, max_drift_ppb: Any, drift: Any, stamps_4: Any, ways_4: Any) -> Any:
    """Into ways_4: down, up, offset, bound, each direction by the offset of its own moment; NOTHING if not known."""
    ways_4[:] = NOTHING
    if heard_both(bound_DK2):
        bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns = stamps_4
        then_ns, then_low_ns, then_high_ns = read_offset(bound_DK2, max_drift_ppb, drift, bs_sent_ns)
        now_ns, low_ns, high_ns = read_offset(bound_DK2, max_drift_ppb, drift, bs_received_ns)
        ways_4[0] = max(node_received_ns - bs_sent_ns - then_ns, 0)
        ways_4[1] = max(bs_received_ns - node_sent_ns + now_ns, 0)
        ways_4[2] = now_ns
        ways_4[3] = max(then_high_ns - then_ns, then_ns - then_low_ns, high_ns - now_ns, now_ns - low_ns)


BOUNDS, FACT, DRIFT = write(types.int64, 4), write(types.int64, 2), read(types.float64, 1)


@native(BOUNDS, FACT, types.int64)
def reset(bound_NDK2: Ints, facts_NF: Ints, node: int) -> int:
    forget(bound_NDK2[node], facts_NF[node])
    return 0


@native(BOUNDS, FACT, DRIFT, types.int64, types.int64, types.int64, types.int64)
def one_way_up(
    bound_NDK2: Ints, facts_NF: Ints, drift_N: Floats, node: int, node_sent_ns: int, bs_received_ns: int, window_ns: int
) -> int:
    """1 if learnt, 0 where the window must turn first."""
    up, down = (node_sent_ns - bs_received_ns, bs_received_ns), (np.int64(NOTHING), bs_received_ns)
    return 1 if learn(bound_NDK2[node], facts_NF[node], drift_N[node], up, down, window_ns) else 0


@native(
    BOUNDS, FACT, DRIFT, read(types.int64, 1), read(types.int64, 2), types.int64, types.int64, write(types.int64, 2)
)
def exchanges(
    bound_NDK2: Ints,
    facts_NF: Ints,
    drift_N: Floats,
    node_B: Ints,
    stamps_B4: Ints,
    first: int,
    window_ns: int,
    ways_B4: Ints,
) -> int:
    """Learn from each exchange from `first` on, and read its one-way times (`read_ways`). Returns the exchange before
    which a window must turn; B when all are done; -1 - the exchange whose stamps cannot be."""
    for i in range(first, node_B.size):
        bound_DK2, facts_F, drift = bound_NDK2[node_B[i]], facts_NF[node_B[i]], drift_N[node_B[i]]
        bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns = stamps_B4[i]
        if not (-LATEST_NS < bs_sent_ns <= bs_received_ns < LATEST_NS):
            return -1 - i
        if not (-LATEST_NS < node_received_ns <= node_sent_ns < LATEST_NS):
            return -1 - i
        up, down = (node_sent_ns - bs_received_ns, bs_received_ns), (bs_sent_ns - node_received_ns, bs_sent_ns)
        if not learn(bound_DK2, facts_F, drift, up, down, window_ns):
            return i
        read_ways(bound_DK2, facts_F[MAX_DRIFT_PPB], drift, stamps_B4[i], ways_B4[i])
    return node_B.size


@native(BOUNDS, FACT, DRIFT, types.int64, types.int64, write(types.int64, 1))
def reading(bound_NDK2: Ints, facts_NF: Ints, drift_N: Floats, node: int, when_ns: int, reading_4: Ints) -> int:
    """Into reading_4: guess, lowest, highest, age. Returns 0 where one direction is not known yet."""
    if not heard_both(bound_NDK2[node]):
        return 0
    most = facts_NF[node, MAX_DRIFT_PPB]
    reading_4[0], reading_4[1], reading_4[2] = read_offset(bound_NDK2[node], most, drift_N[node], when_ns)
    reading_4[3] = when_ns - facts_NF[node, NEWEST]
    return 1


@native(BOUNDS, FACT, DRIFT, types.int64, read(types.int64, 1), write(types.int64, 1))
def one_way_times(bound_NDK2: Ints, facts_NF: Ints, drift_N: Floats, node: int, stamps_4: Ints, ways_4: Ints) -> int:
    read_ways(bound_NDK2[node], facts_NF[node, MAX_DRIFT_PPB], drift_N[node], stamps_4, ways_4)
    return 0


@native(read(types.int64, 2), write(types.int64, 2), read(types.float64, 1), write(types.float64, 2))
def split_times(stamps_B4: Ints, ways_B4: Ints, real_ns_B: Floats, seconds_B4: Floats) -> int:
    """Where each round trip went, in units of real_ns: on the node, down, up, both ways together; NaN if unknown.

    Down and up together are no more than the link took as the base station counts; ways_B4 is changed accordingly.
    """
    for i in range(len(stamps_B4)):
        bs_sent_ns, node_received_ns, node_sent_ns, bs_received_ns = stamps_B4[i]
        residence_ns = node_sent_ns - node_received_ns
        link_ns = max(bs_received_ns - bs_sent_ns - residence_ns, 1)
        seconds_B4[i, 0], seconds_B4[i, 3] = residence_ns / real_ns_B[i], link_ns / real_ns_B[i]
        seconds_B4[i, 1] = seconds_B4[i, 2] = np.nan
        if ways_B4[i, 0] != NOTHING:
            shrink = min(1.0, link_ns / max(ways_B4[i, 0] + ways_B4[i, 1], 1))
            for way in range(2):
                ways_B4[i, way] = np.int64(ways_B4[i, way] * shrink)
                seconds_B4[i, 1 + way] = ways_B4[i, way] / real_ns_B[i]
    return 0
