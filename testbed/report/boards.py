"""What nodes told of themselves: temperature, power, clocks, load, memory. What none told is named, not drawn."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from testbed.report.data import Row, RunData
from testbed.report.figure import LEGEND_ABOVE, MANY, PALETTE, Figure, Spec, facet, hint
from testbed.report.figure import quantity as number

STEPS = 150  # points over a run's time, per node and figure
AXIS_PIXELS = 42  # the same left of every plot, so that they stand in line


class Panel(NamedTuple):
    title: str
    word: str  # where it is missing
    per: float = 1.0


PANELS = {
    "hottest_c": Panel("Hottest zone (°C)", "temperature"),
    "power_w": Panel("Power of the board (W)", "power"),
    "cpu_mhz": Panel("CPU clock (MHz)", "CPU clock"),
    "machine_cpu_percent": Panel("CPU in use, all cores (%)", "CPU load"),
    "gpu_mhz": Panel("GPU clock (MHz)", "GPU clock"),
    "gpu_percent": Panel("GPU in use (%)", "GPU load"),
    "emc_mhz": Panel("Memory clock, EMC (MHz)", "memory clock"),
    "cpu_percent": Panel("CPU of the node's process (% of a core)", "CPU load of its process"),
    "rss_bytes": Panel("Memory of the node's process (GiB)", "memory of its process", 2**30),
    "memory_available_bytes": Panel("Memory available (GiB)", "available memory", 2**30),
}
OF_PROCESS = ("cpu_percent", "rss_bytes")  # all else is the machine's
READING = (
    "Means over short spans, on the base station's clock; a click on a node's name shows it alone. The hottest zone is "
    "the highest temperature of a sample. "
    "Single zones, rails, fans and load are in the table telemetry of logs query. A dot is a span's mean; the "
    "line between two that are far apart is no measurement."
)
NOTHING = "No node told figures of its board in this run, so there is nothing to draw."
ONE_MACHINE = "Nodes were processes of one machine: {} are that machine's, not those of the devices they stand for."
PLAYED = "Devices whose compute is emulated tell figures of the machine that plays them."


def figure(data: RunData) -> Figure:
    """Every node's figures over the run."""
    queries = (boards_query(data), throttled_query(data))
    rows, throttled = (data.rows(query) for query in queries)
    title = "Temperature, power and clocks"
    if not rows:
        return Figure("boards", title, NOTHING, "", None, queries)
    finding = " ".join([*_findings(data, rows, throttled), *_whose(data, rows), *_missing(rows)])
    return Figure("boards", title, finding, READING, _spec(data, rows), queries)


def boards_query(data: RunData) -> str:
    first_s = data.first_sent_ns / 1e9
    drawn = ", ".join(repr(name) for name in PANELS)
    return (
        f"with samples as (\n  select device_name as node, sampled_ns / 1e9 - {first_s} as seconds,\n"
        "    max(value) as value, case when unit = '°C' then 'hottest_c' else figure end as panel\n"
        f"  from telemetry where {data.here} and value is not null group by all\n"
        f"), span as (select greatest(max(seconds) - min(seconds), 1e-3) / {STEPS} as step from samples)\n"
        "select node, panel, floor(seconds / step) * step as seconds, avg(value) as value, max(value) as most\n"
        f"from samples, span where panel in ({drawn}) group by all order by panel, node, seconds"
    )


def throttled_query(data: RunData) -> str:
    return (
        "select device_name as node, count(*) as samples, count(*) filter (value > 0) as throttled from telemetry\n"
        f"where {data.here} and figure = 'throttled' and value is not null group by all order by all"
    )


def _findings(data: RunData, rows: list[Row], throttled: list[Row]) -> list[str]:
    told = [f"{len({row['node'] for row in rows})} of {len(data.devices)} nodes told figures of themselves."]
    for panel, what, unit in (("hottest_c", "hottest was", "°C"), ("power_w", "most power was", "W")):
        if of_panel := [row for row in rows if row["panel"] == panel]:
            top = max(of_panel, key=lambda row: row["most"])
            told.append(f"The {what} {top['node']}'s: {top['most']:.1f} {unit}.")
    if slowed := [row for row in throttled if row["throttled"]]:
        worst = max(slowed, key=lambda row: row["throttled"] / row["samples"])
        share = f"{worst['throttled']} of {worst['samples']} samples"
        told.append(f"Slowed down for heat: {', '.join(row['node'] for row in slowed)} ({worst['node']} in {share}).")
    elif throttled:
        told.append("None that tells of it was slowed down for heat.")
    return told


def _whose(data: RunData, rows: list[Row]) -> list[str]:
    """Whose figures these are, where they are not the device's own."""
    if data.manifest["config"].get("fleet", {}).get("start", "none") != "none":
        told = {row["panel"] for row in rows}
        shared = [panel.word for name, panel in PANELS.items() if name in told and name not in OF_PROCESS]
        return [ONE_MACHINE.format(_listed(shared))] if shared else []
    return [PLAYED] if data.manifest.get("emulated") else []


def _missing(rows: list[Row]) -> list[str]:
    missing = [panel.word for name, panel in PANELS.items() if all(row["panel"] != name for row in rows)]
    return [f"No node told its {_listed(missing, 'or')}."] if missing else []


def _listed(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _spec(data: RunData, rows: list[Row]) -> Spec:
    drawn = [(name, panel) for name, panel in PANELS.items() if any(row["panel"] == name for row in rows)]
    titles = [panel.title for _, panel in drawn]
    values = [_value(row, PANELS[row["panel"]]) for row in rows]
    columns = min(2, len(drawn))
    nodes = [name for name in data.devices if any(row["node"] == name for row in rows)]
    picked = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    line = {
        "params": [{"name": "picked", "select": {"type": "point", "fields": ["node"]}, "bind": "legend"}],
        "mark": {"type": "line", "strokeWidth": 1.6, "strokeJoin": "round", "point": {"size": 9}},
        "encoding": {
            "x": number("seconds", "time since the run's first request (s)", {"nice": False}),
            "y": number("value", None, {"zero": False}, tickCount=5, minExtent=AXIS_PIXELS, maxExtent=AXIS_PIXELS),
            "color": _colour(nodes),
            "opacity": picked,
            "tooltip": [hint("node", "node"), hint("seconds", "s", ".1f"), hint("value", "value", ",.2f")],
        },
    }
    return {
        "data": {"values": values}, "facet": facet("title", titles), "columns": columns,
        "spec": {"width": 820 // columns - 50, "height": 150, **line}, "resolve": {"scale": {"y": "independent"}},
    }  # fmt: skip


def _value(row: Row, panel: Panel) -> Row:
    scaled = round(row["value"] / panel.per, 4)
    return {"node": row["node"], "title": panel.title, "seconds": round(row["seconds"], 3), "value": scaled}


def _colour(nodes: list[str]) -> Mapping[str, object]:
    colours: Spec = {"range": PALETTE[: len(nodes)]} if len(nodes) <= len(PALETTE) else MANY
    scale = {"domain": nodes, **colours}
    return {"field": "node", "type": "nominal", "title": None, "scale": scale, "legend": LEGEND_ABOVE}
