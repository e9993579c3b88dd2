"""What the base station asked of every link, and what came through it, from prompt to prompt."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from testbed.report.data import Row, RunData
from testbed.report.figure import BLUE, GREEN, Figure, Spec, choice, coloured, facet, hint, known
from testbed.report.figure import quantity as number

STEPS = 60  # groups of prompts, where a run has more of them
WAYS = ("down", "up")
COLOURS = {"down": BLUE, "up": GREEN}
READING = (
    "Medians over a prompt's prefill rounds, in emulated time where times are stretched. Dots: bytes over the one-way "
    "time; their vertical line is what the clocks' bound leaves open (the one-way time ± clock_bound_ns), without an "
    "upper end where the bound is as long as the way itself. Dashed line: the rate that was asked for the link, by "
    "what the base station knew of it; there is none where no spectrum is shared."
)


def figure(data: RunData) -> Figure:
    """Rates asked and measured of every node's link, over prompts."""
    query = links_query(data)
    rows = [point for row in data.rows(query) for point in _points(data, row)]
    title = "Link rates, asked and measured"
    if not rows:
        return Figure(
            "links", title, "No one-way time is known in this run, so no rate of a link is.", "", None, (query,)
        )
    return Figure("links", title, _finding(rows), READING, _spec(data, rows), (query,))


def links_query(data: RunData) -> str:
    prompts = data.rows(f"select count(distinct prompt) as prompts from rounds where {data.here}")[0]["prompts"]
    step = max(1, -(-prompts // STEPS))
    ways = ",\n".join(
        f"  median(asked_{way}_bits_per_s) / 1e6 as asked_{way},\n"
        f"  median(8e3 * bytes_{way} * dilation / nullif({way}_ns, 0)) as measured_{way},\n"
        f"  median(8e3 * bytes_{way} * dilation / ({way}_ns + clock_bound_ns)) as low_{way},\n"
        f"  median(8e3 * bytes_{way} * dilation / nullif(greatest({way}_ns - clock_bound_ns, 0), 0)) as high_{way}"
        for way in WAYS
    )
    return (
        f"select policy, device, prompt // {step} * {step} as prompt, count(*) as blocks,\n{ways}\n"
        f"from rounds where {data.here} and phase = 0 and status = 1 and rows > 0\n"
        "  and down_ns is not null and up_ns is not null and clock_bound_ns is not null\n"
        "group by all order by policy, device, prompt"
    )


def _points(data: RunData, row: Row) -> list[Row]:
    who = {"policy": data.policy(row["policy"]), "node": data.device(row["device"]), "prompt": row["prompt"]}
    points = []
    for way in WAYS:
        rates = {name: row[f"{name}_{way}"] for name in ("asked", "measured", "low", "high")}
        known = {name: round(rate, 3) for name, rate in rates.items() if rate is not None}
        if "measured" in known:
            points.append({**who, "way": way, "blocks": row["blocks"], **known})
    return points


def _finding(points: list[Row]) -> str:
    ratios = sorted(point["measured"] / point["asked"] for point in points if point.get("asked"))
    measured = sorted(point["measured"] for point in points)
    span = f"Links carried {measured[0]:.0f} to {measured[-1]:.0f} Mbit/s, by node and prompt"
    if not ratios:
        return f"{span}; no rate was asked of them."
    return f"{span}; the median is {100 * ratios[len(ratios) // 2]:.0f} % of what was asked for the link."


def _spec(data: RunData, points: list[Row]) -> Spec:
    policies = list(dict.fromkeys(point["policy"] for point in points))
    highest = {
        policy: 1.25 * max(max(p["measured"], p.get("asked", 0.0)) for p in points if p["policy"] == policy)
        for policy in policies
    }
    points = [{**p, "top": min(p.get("high", highest[p["policy"]]), highest[p["policy"]])} for p in points]
    columns = min(4, len(data.devices))
    x = number("prompt", "prompt", {"nice": False, "padding": 12}, tickMinStep=1, tickCount=6, format="d")
    y = number("measured", "Mbit/s", {"nice": False}, tickCount=4)
    way = coloured("way", COLOURS)
    tips = [
        hint("node", "node"), hint("prompt", "prompt"), hint("way", "way"), hint("measured", "measured, Mbit/s", ".1f"),
        hint("low", "at least", ".1f"), hint("high", "at most", ".1f"), hint("asked", "asked, Mbit/s", ".1f"),
        hint("blocks", "blocks", "d"),
    ]  # fmt: skip
    asked = {
        "mark": {"type": "line", "strokeDash": [5, 3], "strokeWidth": 1.5, "opacity": 0.9},
        "encoding": {"x": x, "y": {**y, "field": "asked"}, "color": way},
    }
    open_to = {
        "mark": {"type": "rule", "strokeWidth": 1.3, "opacity": 0.55, "clip": True},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "top"}, "color": way},
    }
    dots = {
        "mark": {"type": "point", "filled": True, "size": 34, "opacity": 1},
        "encoding": {"x": x, "y": y, "color": way, "tooltip": tips},
    }
    plot = {
        "width": (800 - 22 * (columns - 1)) // columns,
        "height": 120,
        "layer": [*known(asked, points, "asked"), open_to, dots],
    }
    menu = {"params": [choice("policy", "Policy", policies)]} if len(policies) > 1 else {}
    only = {"transform": [{"filter": "datum.policy === policy"}]} if menu else {}
    return {
        **menu, **only, "data": {"values": points}, "facet": facet("node", data.devices), "columns": columns,
        "spec": plot,
    }  # fmt: skip
