"""What nodes tell of themselves, as a table: a column for each figure that any of them knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from testbed.cli.output import table
from testbed.watch.figures import NodeFigures, Telemetry
from testbed.watch.words import plain

GIB = 2**30
Shown = Callable[[Telemetry], str | None]


def boards(nodes: Sequence[NodeFigures]) -> Table | None:
    """None where no node told anything."""
    if not any(node.telemetry for node in nodes):
        return None
    cells = {head: [shown(node.telemetry) for node in nodes] for head, shown in COLUMNS.items()}
    known = {head: column for head, column in cells.items() if any(cell is not None for cell in column)}
    rows = [[node.device, *(column[row] or "-" for column in known.values())] for row, node in enumerate(nodes)]
    drawn = table("Boards: what each node told of itself last", ["node", *known], rows)
    for row, node in zip(drawn.rows, nodes, strict=True):
        row.style = "red" if node.present is False else "yellow" if node.telemetry.figures.get("throttled") else None
    return drawn


def _hottest(told: Telemetry) -> str | None:
    return None if told.hottest is None else f"{told.hottest[1]:.1f} {told.hottest[0]}"


def _figure(name: str, per: float = 1.0) -> Shown:
    def shown(told: Telemetry) -> str | None:
        value = told.figures.get(name)
        return None if value is None else plain(value / per)

    return shown


def _fan(told: Telemetry) -> str | None:
    speeds = [value for name, value in told.known("_percent") if name.startswith("fan_")]
    return plain(max(speeds)) if speeds else None


def _throttled(told: Telemetry) -> str | None:
    state = told.figures.get("throttled")
    return None if state is None else "yes" if state else "no"


COLUMNS: dict[str, Shown] = {
    "°C\nhottest": _hottest,
    "W": lambda told: None if told.power_w is None else plain(told.power_w),
    "throt-\ntled": _throttled,
    "CPU %\nall cores": _figure("machine_cpu_percent"),
    "CPU %\nnode": _figure("cpu_percent"),
    "load\n1 min": _figure("load_1m"),
    "CPU\nMHz": _figure("cpu_mhz"),
    "GPU %": _figure("gpu_percent"),
    "GPU\nMHz": _figure("gpu_mhz"),
    "EMC\nMHz": _figure("emc_mhz"),
    "fan %": _fan,
    "GiB\nnode": _figure("rss_bytes", GIB),
    "GiB\nfree": _figure("memory_available_bytes", GIB),
}
