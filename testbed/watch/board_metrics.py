"""What nodes told of themselves, in Prometheus' base units: celsius, watts, hertz, bytes, ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from testbed.watch.figures import NodeFigures, Telemetry

Labelled = Iterable[tuple[str | None, float]]  # the second label's value, where there is one
MEGAHERTZ, PERCENT = 1e6, 0.01


def of_boards(nodes: Sequence[NodeFigures]) -> Iterator[Metric]:
    """A gauge for each kind of figure. Its series are as many as the log has names, and those are bounded."""
    for name, (meaning, label, values) in GAUGES.items():
        gauge = GaugeMetricFamily(name, meaning, labels=["device", *([label] if label else [])])
        for node in nodes:
            for of, value in values(node.telemetry):
                gauge.add_metric([node.device, *([of] if of else [])], value)
        yield gauge


def _one(name: str, times: float = 1.0) -> Callable[[Telemetry], Labelled]:
    def values(told: Telemetry) -> Labelled:
        value = told.figures.get(name)
        return [] if value is None else [(None, value * times)]

    return values


def _each(
    suffix: str, times: float = 1.0, *, prefix: str = "", without: tuple[str, ...] = ()
) -> Callable[[Telemetry], Labelled]:
    def values(told: Telemetry) -> Labelled:
        for name, value in told.known(suffix):
            if name.startswith(prefix) and not name.startswith(without):
                yield name.removesuffix(suffix).removeprefix(prefix), value * times

    return values


def _power(told: Telemetry) -> Labelled:
    return [] if told.power_w is None else [(None, told.power_w)]


def _at(told: Telemetry) -> Labelled:
    return [] if told.at_realtime_s is None else [(None, told.at_realtime_s)]


GAUGES: dict[str, tuple[str, str | None, Callable[[Telemetry], Labelled]]] = {
    "wdmoe_node_power_watts": ("What its board reported last.", None, _power),
    "wdmoe_node_rail_power_watts": ("Of one of the board's rails.", "rail", _each("_w")),
    "wdmoe_node_temperature_celsius": ("Of a thermal zone.", "zone", _each("_c")),
    "wdmoe_node_throttled": ("1 while the kernel slows a clock for heat.", None, _one("throttled")),
    "wdmoe_node_clock_hertz": ("Mean over clusters of the CPU; GPU, EMC.", "clock", _each("_mhz", MEGAHERTZ)),
    "wdmoe_node_process_cpu_ratio": ("Of one core, by the node's process.", None, _one("cpu_percent", PERCENT)),
    "wdmoe_node_cpu_ratio": ("Of all cores, by all processes.", None, _one("machine_cpu_percent", PERCENT)),
    "wdmoe_node_unit_busy_ratio": (
        "Of the GPU, or of the memory controller (EMC).",
        "unit",
        _each("_percent", PERCENT, without=("cpu_", "machine_", "fan_")),
    ),
    "wdmoe_node_load1": ("Processes that run or wait, mean of a minute.", None, _one("load_1m")),
    "wdmoe_node_resident_memory_bytes": ("Of the node's process.", None, _one("rss_bytes")),
    "wdmoe_node_memory_available_bytes": ("Of the machine.", None, _one("memory_available_bytes")),
    "wdmoe_node_fan_ratio": ("Of its full speed.", "fan", _each("_percent", PERCENT, prefix="fan_")),
    "wdmoe_node_fan_rpm": ("Turns a minute.", "fan", _each("_rpm", prefix="fan_")),
    "wdmoe_node_told_timestamp_seconds": ("When the node told figures last, since 1970.", None, _at),
}
