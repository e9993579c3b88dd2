"""What boards told of themselves: temperature, power, clocks. Nothing is drawn where they told nothing."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from testbed.report.data import Row, RunData
from testbed.report.figure import MANY, PALETTE, Figure, Spec, facet, hint
from testbed.report.figure import quantity as number

STEPS = 150  # points over a run's time, per node and figure
UNITS = {"_c": "°C", "_w": "W", "_mhz": "MHz", "_percent": "%"}
READING = (
    "Means over short spans, on the base station's clock, one plot per figure that a board told. A sensor that is off "
    "or missing leaves a gap."
)
NOTHING = "No board told its temperature, power or clocks in this run, so there is nothing to draw."
PLAYED = " Its devices are emulated: figures of this machine would not be theirs."


def figure(data: RunData) -> Figure:
    """Every board's figures over the run."""
    query = boards_query(data)
    rows = [row for row in data.rows(query) if row["value"] is not None]
    title = "Temperature, power and clocks"
    if not rows:
        return Figure("boards", title, NOTHING + (PLAYED if data.manifest.get("emulated") else ""), "", None, (query,))
    values = [{**row, "figure": with_unit(row["figure"])} for row in rows]
    watts = [row for row in rows if row["figure"] == "power_w"]
    finding = f"{len({row['node'] for row in rows})} of {len(data.devices)} boards told figures of their own."
    if watts:
        top = max(watts, key=lambda row: row["value"])
        finding += f" The most power was {top['node']}'s: {top['value']:.1f} W."
    return Figure("boards", title, finding, READING, _spec(values), (query,))


def boards_query(data: RunData) -> str:
    first_s = data.first_sent_ns / 1e9
    return (
        f"with samples as (\n  select device_name as node, figure, sampled_ns / 1e9 - {first_s} as seconds, value\n"
        "  from (\n    unpivot telemetry on columns(* exclude (run, device_name, sampled_ns, rail))\n"
        f"    into name figure value value\n  ) where {data.here}\n"
        f"), span as (select greatest(max(seconds) - min(seconds), 1e-3) / {STEPS} as step from samples)\n"
        "select node, figure, floor(seconds / step) * step as seconds, avg(value) as value\n"
        "from samples, span group by all order by figure, node, seconds"
    )


def with_unit(figure: str) -> str:
    """A figure's name for people: `cpu_c` is cpu (°C)."""
    for suffix, unit in UNITS.items():
        if figure.endswith(suffix):
            return f"{figure.removesuffix(suffix).replace('_', ' ')} ({unit})"
    return figure


def _spec(values: list[Row]) -> Spec:
    nodes, figures = (list(dict.fromkeys(value[key] for value in values)) for key in ("node", "figure"))
    colours: Spec = {"range": PALETTE[: len(nodes)]} if len(nodes) <= len(PALETTE) else MANY
    columns = min(2, len(figures))
    line = {
        "mark": {"type": "line", "strokeWidth": 1.7, "point": {"size": 14}},
        "encoding": {
            "x": number("seconds", "time since the run's first request (s)", {"nice": False}),
            "y": number("value", None, {"zero": False}, tickCount=5),
            "color": {"field": "node", "type": "nominal", "title": None, "scale": {"domain": nodes, **colours}},
            "tooltip": [hint("node", "node"), hint("seconds", "s", ".1f"), hint("value", "value", ".2f")],
        },
    }
    plot = {"width": 780 // columns - 30, "height": 160, **line}
    return {
        "data": {"values": [{**v, "seconds": round(v["seconds"], 3), "value": round(v["value"], 3)} for v in values]},
        "facet": facet("figure", figures), "columns": columns, "spec": plot,
        "resolve": {"scale": {"y": "independent"}},
    }  # fmt: skip
