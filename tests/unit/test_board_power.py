"""Which heartbeats become a power sample. Heartbeats and their figures are synthetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_node.power import BoardPower
from testbed.wire.messages import Heartbeat

S = 10**9
NODE_NS, HERE_NS = 1000 * S, 77 * S  # two clocks at the same moment


class Listener:
    """A node's heartbeats, and what is told of them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._power = BoardPower()

    def beat(
        self, at_s: float, sampled_s: float, power_w: float | None, joins: int = 1, rail: str | None = "VDD_IN"
    ) -> None:
        figures = {"rss_bytes": 1e6, "tot_w": power_w, "board_age_s": at_s - sampled_s}
        self.hear(at_s, figures | ({} if rail is None else {f"tot_rail:{rail}": 1.0}), joins)

    def hear(self, at_s: float, figures: dict[str, float | None], joins: int = 1) -> None:
        heartbeat = Heartbeat(NODE_NS + int(at_s * S), figures)

        def on_event(kind: str, **facts: Any) -> None:
            self.events.append((kind, facts))

        self._power.tell("near", joins, heartbeat, HERE_NS + int(at_s * S), on_event)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [facts for told, facts in self.events if told == kind]


def test_a_new_sample_is_told_with_its_stamp_on_the_base_stations_clock() -> None:
    node = Listener()
    node.beat(at_s=3.0, sampled_s=2.5, power_w=5.5)
    assert node.told("power") == [{"device": "near", "power_w": 5.5, "sampled_ns": HERE_NS + 25 * S // 10}]


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
def test_a_sample_that_is_repeated_is_told_once(pause_s: float) -> None:
    """Its age is taken a moment after the heartbeat's own stamp."""
    node = Listener()
    for at_s, later_s in ((3.0, 0.0), (3.5, pause_s), (4.0, 0.0), (60.0, pause_s)):
        node.beat(at_s, 2.5 - later_s, 5.5)
    assert len(node.told("power")) == 1


def test_every_new_sample_is_told_also_of_the_same_power() -> None:
    node = Listener()
    for at_s, taken_s in ((3.0, 2.5), (3.5, 2.5), (4.0, 3.5), (4.5, 4.4)):
        node.beat(at_s, taken_s, 5.5)
    sampled_s = [(facts["sampled_ns"] - HERE_NS) / S for facts in node.told("power")]
    assert sampled_s == pytest.approx([2.5, 3.5, 4.4])


def test_the_rail_is_told_once_for_every_join() -> None:
    node = Listener()
    for at_s, joins in ((1.0, 1), (2.0, 1), (3.0, 2), (4.0, 2)):
        node.beat(at_s, at_s - 0.1, 5.5, joins)
    assert node.told("power_rail") == [{"device": "near", "rail": "VDD_IN"}] * 2


def test_a_rail_that_is_not_named_is_unknown() -> None:
    node = Listener()
    node.beat(1.0, 0.9, 5.5, rail=None)
    assert node.told("power_rail") == [{"device": "near", "rail": None}]


@pytest.mark.parametrize("power_w", [None, 0.0, -1.0])
def test_a_board_that_does_not_know_its_power_tells_none(power_w: float | None) -> None:
    node = Listener()
    node.beat(1.0, 0.9, power_w)
    assert node.events == []


@pytest.mark.parametrize("age_s", [None, -0.1, 1e5, 1e300])
def test_a_sample_of_no_age_or_an_impossible_one_is_not_told(age_s: float | None) -> None:
    node = Listener()
    node.hear(1.0, {"tot_w": 5.5, "board_age_s": age_s})
    assert node.events == []


def test_a_node_without_a_board_tells_nothing() -> None:
    node = Listener()
    node.hear(1.0, {"rss_bytes": 1e6})
    assert node.events == []


FIGURE = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


@given(st.lists(st.tuples(FIGURE, FIGURE), max_size=8))
def test_whatever_a_node_reports_what_is_told_is_a_power_and_a_stamp(reported: list[tuple[Any, Any]]) -> None:
    node = Listener()
    for at_s, (power_w, age_s) in enumerate(reported):
        node.hear(float(at_s), {"tot_w": power_w, "board_age_s": age_s})
    for facts in node.told("power"):
        assert 0 < facts["power_w"] < math.inf
        assert isinstance(facts["sampled_ns"], int)
