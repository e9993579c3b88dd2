"""What `testbed watch` shows of nodes' temperature, power, clocks, load and memory. Figures are synthetic."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from testbed.watch.figures import Figures
from testbed.watch.tally import Tally
from testbed.watch.view import view

prometheus_client = pytest.importorskip("prometheus_client")

HOST = {
    "cpu_percent": 80.0, "machine_cpu_percent": 25.0, "load_1m": 1.5, "rss_bytes": 2.0**30,
    "memory_available_bytes": 3 * 2.0**30, "cpu_mhz": 1344.0, "throttled": 0.0,
}  # fmt: skip
BOARD = {
    "cpu_c": 46.0, "tj_c": 48.5, "cv0_c": None, "gpu_percent": 40.0, "gpu_mhz": 306.0, "emc_mhz": 2133.0,
    "emc_percent": 5.0, "vdd_soc_w": 1.5, "fan_pwmfan0_percent": 26.0, "fan_pwmfan0_rpm": 1145.0,
}  # fmt: skip
S = 10**9


def telemetry(device: str, *figures: dict[str, Any], at_ns: int = 7 * S) -> dict[str, Any]:
    samples = [{"sampled_ns": at_ns, "figures": of_group} for of_group in figures]
    return {"realtime_ns": at_ns, "monotonic_ns": at_ns, "kind": "telemetry", "device": device, "samples": samples}


def figures_after(*events: dict[str, Any]) -> Figures:
    tally = Tally("run", {"policies": ["topk"], "devices": ["near", "far"], "config": {}})
    tally.add_events(events)
    return tally.figures("running")


def drawn(figures: Figures) -> str:
    paper = io.StringIO()
    Console(file=paper, width=180, highlight=False, markup=False).print(view(figures))
    return paper.getvalue()


def row(figures: Figures, device: str) -> list[str]:
    """Cells of the device in the table of boards."""
    table = drawn(figures).split("Boards", 1)[1]
    return next(line.split() for line in table.splitlines() if line.strip().startswith(device))


def scraped(figures: Figures) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    from testbed.watch.metrics import RunCollector

    collector, registry = RunCollector(), prometheus_client.CollectorRegistry(auto_describe=False)
    collector.figures = figures
    registry.register(collector)
    families = text_string_to_metric_families(prometheus_client.generate_latest(registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_board_s_newest_figures_stand_in_a_table_of_their_own() -> None:
    power = {"kind": "power", "device": "near", "power_w": 5.5, "sampled_ns": 1}
    figures = figures_after(power, telemetry("near", HOST, BOARD))
    assert row(figures, "near") == [
        "near", "48.5", "tj", "5.5", "no", "25", "80", "1.5", "1344", "40", "306", "2133", "26", "1", "3",
    ]  # fmt: skip
    assert set(row(figures, "far")[1:]) == {"-"}


def test_a_figure_that_no_node_knows_has_no_column() -> None:
    table = drawn(figures_after(telemetry("near", {"rss_bytes": 2.0**30, "cv0_c": None}))).split("Boards", 1)[1]
    assert "GiB" in table
    assert "hottest" not in table
    assert "GPU" not in table


@pytest.mark.parametrize("events", [(), (telemetry("near", {"cv0_c": None}),)])
def test_without_figures_there_is_no_such_table(events: tuple[dict[str, Any], ...]) -> None:
    assert "Boards" not in drawn(figures_after(*events))


def test_a_newer_sample_replaces_its_own_figures_only() -> None:
    figures = figures_after(
        telemetry("near", HOST, BOARD), telemetry("near", {**HOST, "cpu_mhz": None, "throttled": 1.0}, at_ns=9 * S)
    )
    told = figures.nodes[0].telemetry
    assert (told.figures["cpu_mhz"], told.figures["tj_c"], told.at_realtime_s) == (None, 48.5, 9.0)
    assert row(figures, "near")[3] == "yes"


def test_prometheus_gets_base_units_with_the_unit_in_the_name() -> None:
    power = {"kind": "power", "device": "near", "power_w": 5.5, "sampled_ns": 1}
    found = scraped(figures_after(power, telemetry("near", HOST, BOARD)))
    near = ("device", "near")
    for name, labels, value in (
        ("temperature_celsius", [("zone", "tj")], 48.5),
        ("power_watts", [], 5.5),
        ("rail_power_watts", [("rail", "vdd_soc")], 1.5),
        ("clock_hertz", [("clock", "cpu")], 1.344e9),
        ("clock_hertz", [("clock", "gpu")], 3.06e8),
        ("process_cpu_ratio", [], 0.8),
        ("cpu_ratio", [], 0.25),
        ("unit_busy_ratio", [("unit", "gpu")], 0.4),
        ("load1", [], 1.5),
        ("resident_memory_bytes", [], 2**30),
        ("memory_available_bytes", [], 3 * 2**30),
        ("fan_ratio", [("fan", "pwmfan0")], 0.26),
        ("fan_rpm", [("fan", "pwmfan0")], 1145),
        ("throttled", [], 0),
        ("told_timestamp_seconds", [], 7),
    ):
        assert found[f"wdmoe_node_{name}", tuple(sorted([near, *labels]))] == pytest.approx(value), name


def test_what_is_unknown_has_no_series() -> None:
    found = scraped(figures_after(telemetry("near", {"cv0_c": None, "cpu_mhz": None})))
    told = {name for name, labels in found if name.startswith("wdmoe_node_") and ("device", "near") in labels}
    assert told == {"wdmoe_node_told_timestamp_seconds", "wdmoe_node_joins_total"}


NAMES = st.one_of(
    st.sampled_from([*HOST, *BOARD]),
    st.from_regex(r"[a-z0-9][a-z0-9_]{0,20}_(c|w|mhz|percent|bytes|rpm)", fullmatch=True),
)
VALUES = st.one_of(st.none(), st.floats(-1e15, 1e15))


@settings(max_examples=15)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=20), max_size=4))
def test_whatever_is_logged_view_document_and_scrape_hold(told: list[dict[str, Any]]) -> None:
    figures = figures_after(*(telemetry("near", sample) for sample in told))
    drawn(figures)
    json.dumps(figures.document(), allow_nan=False)
    assert all(math.isfinite(value) for value in scraped(figures).values())
