"""Which heartbeats become a telemetry event, and how little of a hostile one does. Figures are synthetic."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from bs_node.telemetry import MOST_NAMES, NodeTelemetry
from testbed.errors import MessageError
from testbed.wire.figures import HOST, is_figure, samples, unit_of
from testbed.wire.messages import MAX_FIGURES, Heartbeat, decode_from_node

S = 10**9
NODE_NS, HERE_NS = 1000 * S, 77 * S  # two clocks at the same moment
HEARTBEAT = 1  # its kind on the wire
HOST_FIGURES = {"rss_bytes": 1e6, "cpu_percent": 12.5}


class Listener:
    """What the base station is told of a node's heartbeats."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._telemetry = NodeTelemetry()

    def hear(self, at_s: float, figures: dict[str, float | None]) -> None:
        heartbeat = Heartbeat(NODE_NS + int(at_s * S), figures)

        def on_event(kind: str, **facts: Any) -> None:
            self.events.append((kind, facts))

        self._telemetry.tell("near", heartbeat, HERE_NS + int(at_s * S), on_event)

    def told(self, kind: str = "telemetry") -> list[dict[str, Any]]:
        return [facts for told, facts in self.events if told == kind]


def test_host_and_board_are_two_samples_each_stamped_when_it_was_taken() -> None:
    node = Listener()
    of_board = {"cpu_c": 46.0, "gpu_mhz": 306.0, "cv0_c": None, "board_age_s": 0.5}
    node.hear(3.0, {**HOST_FIGURES, "host_age_s": 0.25, **of_board})
    (event,) = node.told()
    assert event == {
        "device": "near",
        "samples": [
            {"sampled_ns": HERE_NS + int(2.75 * S), "figures": HOST_FIGURES},
            {"sampled_ns": HERE_NS + int(2.5 * S), "figures": {"cpu_c": 46.0, "gpu_mhz": 306.0, "cv0_c": None}},
        ],
    }


def test_without_a_board_temperatures_are_the_hosts() -> None:
    assert set(samples({"rss_bytes": 1.0, "cpu_c": 40.0})) == {"host"}


def test_heartbeats_that_come_faster_are_told_once_a_second() -> None:
    node = Listener()
    for beat in range(101):
        node.hear(beat * 0.1, HOST_FIGURES)
    assert len(node.told()) == 11


def test_a_board_that_is_stuck_is_not_told_again_while_its_host_is() -> None:
    node = Listener()
    for at_s in (1.0, 2.0, 3.0):
        node.hear(at_s, {**HOST_FIGURES, "cpu_c": 46.0, "board_age_s": at_s - 0.75})
    assert [len(event["samples"]) for event in node.told()] == [2, 1, 1]


def test_a_host_that_samples_when_the_board_was_sampled_before_is_told() -> None:
    """Stamps of one group are never taken for the other's."""
    node = Listener()
    node.hear(1.0, {**HOST_FIGURES, "cpu_c": 46.0, "board_age_s": 0.0, "host_age_s": 0.9})
    node.hear(2.0, {**HOST_FIGURES, "cpu_c": 47.0, "board_age_s": 1.9, "host_age_s": 1.0})
    assert len(node.told()[1]["samples"]) == 2


@pytest.mark.parametrize("value", [1e300, -1e16])
def test_what_no_sensor_can_say_is_unknown(value: float) -> None:
    node = Listener()
    node.hear(1.0, {"cpu_mhz": value})
    assert node.told()[0]["samples"][0]["figures"] == {"cpu_mhz": None}


@pytest.mark.parametrize("age_s", [-0.1, 1e5, 1e300])
def test_a_sample_of_an_impossible_age_is_not_told(age_s: float) -> None:
    node = Listener()
    node.hear(1.0, {**HOST_FIGURES, "host_age_s": age_s})
    assert node.events == []


def test_total_power_is_told_by_its_own_event_only() -> None:
    node = Listener()
    node.hear(1.0, {"tot_w": 5.5, "vdd_soc_w": 1.5, "board_age_s": 0.1, "tot_rail:VDD_IN": 1.0})
    assert node.told()[0]["samples"][0]["figures"] == {"vdd_soc_w": 1.5}


@pytest.mark.parametrize(
    "name", ["", "_c", "cpu", "CPU_c", "a b_c", 'x"}_c', "é_c", "a\n_c", "cpu_c\n", "x" * 41 + "_c", "../a_w", "9.5_c"]
)
def test_a_name_of_another_form_is_no_figure(name: str) -> None:
    assert not is_figure(name)


def test_every_name_that_ends_in_a_unit_has_it() -> None:
    names = ("cpu_c", "power_w", "gpu_mhz", "cpu_percent", "rss_bytes", "fan_0_rpm", "load_1m")
    assert [unit_of(name) for name in names] == ["°C", "W", "MHz", "%", "bytes", "rpm", ""]


def test_a_node_that_renames_its_sensors_for_ever_fills_neither_log_nor_labels() -> None:
    node = Listener()
    for beat in range(500):
        node.hear(float(beat), {f"zone_{beat}_{place}_c": 1.0 for place in range(MAX_FIGURES)} | HOST_FIGURES)
    named = {name for event in node.told() for sample in event["samples"] for name in sample["figures"]}
    assert len(named) == MOST_NAMES + len(HOST_FIGURES)
    assert node.told()[-1]["samples"][0]["figures"] == HOST_FIGURES, "what every machine tells goes on"
    assert node.told("telemetry_full") == [{"device": "near", "names": MOST_NAMES}]


def test_a_node_with_as_many_names_as_are_taken_is_not_said_to_be_full() -> None:
    node = Listener()
    for beat in range(4):
        half = range(0, MOST_NAMES // 2) if beat % 2 else range(MOST_NAMES // 2, MOST_NAMES)
        node.hear(float(beat), {f"zone_{place}_c": 1.0 for place in half})
    assert node.told("telemetry_full") == []


NAMES = st.one_of(st.sampled_from([*HOST, "cpu_c", "host_age_s", "board_age_s", "tot_w"]), st.text(max_size=60))
VALUES = st.one_of(st.none(), st.floats(), st.text(max_size=5), st.integers(-(2**63), 2**64 - 1))


@settings(max_examples=60)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=60), max_size=6))
def test_whatever_a_node_sends_events_are_small_finite_and_of_known_names(sent: list[dict[str, Any]]) -> None:
    node = Listener()
    for at_s, figures in enumerate(sent):
        try:
            heartbeat = decode_from_node(msgpack.encode([HEARTBEAT, 1, figures]))
        except MessageError:
            continue
        assert isinstance(heartbeat, Heartbeat)
        node.hear(2.0 * at_s, heartbeat.figures)
    for event in node.told():
        assert len(json.dumps(event, allow_nan=False)) < 8192
        for sample in event["samples"]:
            assert type(sample["sampled_ns"]) is int
            assert all(is_figure(name) for name in sample["figures"])
            assert all(value is None or abs(value) <= 1e15 for value in sample["figures"].values())
