"""The base station's estimates beside what it measured: per node over time, and how far off by node."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from testbed.report.data import Row, RunData
from testbed.report.figure import BLACK, BLUE, GREY, ORANGE, SKY, Figure, Spec, coloured, facet, hint, names
from testbed.report.figure import quantity as number
from testbed.report.phases import MODES

STEPS = 60  # points over a run's time, per node
TIME_READING = (
    "Medians over short spans of the run, prefill rounds: what a block was expected to take (way down, node, way up) "
    "when it was sent, and what it took from the first byte out to the last byte in, all by the base station's clock. "
    "The band holds the middle 80 % of what was measured. Dotted lines: the next policy begins."
)
ERROR_READING = (
    "Measured time divided by expected time of every answered block: 1 is a perfect estimate, 2 took twice as long. "
    "Thick bar: the middle half; thin: from the 5th to the 95th percentile; white tick: the median."
)
TICKS = {
    "values": [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.7, 2, 3, 5, 10, 30, 100],
    "format": "~g",
}
COLOURS = {"expected": ORANGE, "measured": BLUE}


def over_time(data: RunData) -> Figure:
    """Expected and measured block times of every node, over the run."""
    query = time_query(data)
    rows = data.rows(query)
    title = "Estimate against measurement over time"
    if not rows:
        return Figure("estimates", title, _nothing("prefill"), "", None, (query,))
    switches = switches_query(data)
    begins = [{"seconds": row["seconds"]} for row in data.rows(switches)[1:]]
    off = sorted(row["measured_ms"] / row["expected_ms"] for row in rows)
    finding = (
        f"In the median of all spans, blocks took {off[len(off) // 2]:.2f} times what was expected of them; in nine of "
        f"ten spans between {off[len(off) // 20]:.2f} and {off[-1 - len(off) // 20]:.2f} times."
    )
    return Figure("estimates", title, finding, TIME_READING, _time_spec(data, rows, begins), (query, switches))


def errors(data: RunData) -> Figure:
    """How far estimates are off, by node."""
    query = error_query(data)
    rows = [{**row, "node": data.device(row["device"]), "mode": MODES[row["phase"]]} for row in data.rows(query)]
    title = "How far estimates are off"
    if not rows:
        return Figure("estimate-errors", title, _nothing("answered"), "", None, (query,))
    worst = max(rows, key=lambda row: row["p95"])
    finding = (
        f"The longest surprises are {worst['node']}'s in {worst['mode']} rounds: one block in twenty took more than "
        f"{worst['p95']:.2f} times what was expected."
    )
    return Figure("estimate-errors", title, finding, ERROR_READING, _error_spec(data, rows), (query,))


def time_query(data: RunData) -> str:
    return (
        "with blocks as (\n  select device, (bs_sent_ns - " + str(data.first_sent_ns) + ") / 1e9 as seconds,\n"
        "    1e3 * (predicted_down_s + predicted_compute_s + predicted_up_s) as expected_ms,\n"
        "    (bs_received_ns - bs_sent_ns) / dilation / 1e6 as measured_ms\n"
        f"  from rounds where {data.here} and phase = 0 and status = 1 and rows > 0\n"
        f"), span as (select greatest(max(seconds), 1e-3) / {STEPS} as step from blocks)\n"
        "select device, (floor(seconds / step) + 0.5) * step as seconds, count(*) as blocks,\n"
        "  median(expected_ms) as expected_ms, median(measured_ms) as measured_ms,\n"
        "  quantile_cont(measured_ms, 0.1) as low_ms, quantile_cont(measured_ms, 0.9) as high_ms\n"
        "from blocks, span where expected_ms > 0 and measured_ms > 0\ngroup by all order by device, seconds"
    )


def switches_query(data: RunData) -> str:
    return (
        f"select policy, (min(bs_sent_ns) - {data.first_sent_ns}) / 1e9 as seconds\n"
        f"from rounds where {data.here} and bs_sent_ns is not null group by policy order by seconds"
    )


def error_query(data: RunData) -> str:
    levels = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
    columns = ", ".join(f"quantile_cont(ratio, {level}) as {name}" for name, level in levels.items())
    return (
        f"select phase, device, count(*) as blocks,\n  {columns}\nfrom (\n"
        "  select phase, device, (bs_received_ns - bs_sent_ns) / dilation / 1e9\n"
        "    / nullif(predicted_down_s + predicted_compute_s + predicted_up_s, 0) as ratio\n"
        f"  from rounds where {data.here} and status = 1 and rows > 0\n"
        ")\nwhere ratio > 0 group by all order by all"
    )


def _nothing(which: str) -> str:
    return f"No {which} block of this run has an estimate beside its measurement."


def _time_spec(data: RunData, rows: list[Row], begins: list[Row]) -> Spec:
    values = [{**_short(row), "node": data.device(row["device"])} for row in rows]
    x = number("seconds", "run time (s)", {"nice": False}, tickCount=5)
    y_scale = {"type": "log", "nice": False, "padding": 4}
    y = number("measured_ms", "block: out and back (ms)", y_scale, tickCount=4, format="~g")
    columns = min(4, len(data.devices))
    rules: Spec = {
        "data": {"values": begins},
        "mark": {"type": "rule", "color": GREY, "strokeDash": [1, 3]},
        "encoding": {"x": x},
    }
    band: Spec = {
        "mark": {"type": "area", "color": SKY, "opacity": 0.35, "line": False},
        "encoding": {"x": x, "y": {**y, "field": "low_ms"}, "y2": {"field": "high_ms"}},
    }
    tips = [
        hint("node", "node"), hint("seconds", "s", ".1f"), hint("measured_ms", "measured, ms", ".3f"),
        hint("expected_ms", "expected, ms", ".3f"), hint("blocks", "blocks", "d"),
    ]  # fmt: skip
    lines: list[Spec] = [
        {
            "transform": [{"calculate": f"'{name}'", "as": "which"}],
            "mark": {"type": "line", "strokeWidth": width, "clip": True},
            "encoding": {
                "x": x,
                "y": {**y, "field": f"{name}_ms"},
                "color": coloured("which", COLOURS),
                "tooltip": tips,
            },
        }
        for name, width in (("measured", 2.6), ("expected", 1.2))
    ]
    layers: list[Spec] = [*([rules] if begins else []), band, *lines]
    plot = {"width": (800 - 22 * (columns - 1)) // columns, "height": 130, "layer": layers}
    return {"data": {"values": values}, "facet": facet("node", data.devices), "columns": columns, "spec": plot}


def _error_spec(data: RunData, rows: list[Row]) -> Spec:
    values = [_short(row) for row in rows]
    lane = names("node", data.devices)
    x = number("p05", "measured / expected", {"type": "log", "nice": False, "padding": 12}, **TICKS)
    tips = [
        hint("node", "node"), hint("blocks", "blocks", "d"),
        *(hint(name, f"{int(name[1:])}th percentile", ".2f") for name in ("p05", "p25", "p50", "p75", "p95")),
    ]  # fmt: skip
    one = {
        "data": {"values": [{"ratio": 1}]},
        "mark": {"type": "rule", "color": BLACK, "strokeDash": [4, 3]},
        "encoding": {"x": {**x, "field": "ratio"}},
    }
    thin = {
        "mark": {"type": "rule", "color": BLUE, "strokeWidth": 1.6},
        "encoding": {"x": x, "x2": {"field": "p95"}, "y": lane, "tooltip": tips},
    }
    thick = {
        "mark": {"type": "bar", "color": BLUE, "height": {"band": 0.52}},
        "encoding": {"x": {**x, "field": "p25"}, "x2": {"field": "p75"}, "y": lane, "tooltip": tips},
    }
    middle = {
        "mark": {"type": "tick", "color": "white", "thickness": 2.4, "height": {"band": 0.52}},
        "encoding": {"x": {**x, "field": "p50"}, "y": lane},
    }
    modes = [mode for mode in MODES.values() if mode in {row["mode"] for row in rows}]
    plot = {"width": 800 // len(modes) - 20, "height": {"step": 22}, "layer": [one, thin, thick, middle]}
    return {
        "data": {"values": values}, "facet": facet("mode", modes), "columns": len(modes), "spec": plot,
    }  # fmt: skip


def _short(row: Row) -> Row:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
