"""The figures of docs/paper.md on what the paper leaves open, and on when a layer is better computed elsewhere."""

from __future__ import annotations

from typing import Any

from paper_look import (
    BLACK,
    BLUE,
    DECADES,
    GREEN,
    GREY,
    ORANGE,
    PAPER_CUT,
    POINT,
    RED,
    Spec,
    axis,
    layer,
    named,
    title,
    wide_legend,
)

LEAST, MOST = min(PAPER_CUT[0.2]), max(PAPER_CUT[0.2])
MESH_WORK_MS, MESH_RTT_MS, MESH_LAN_MS = (0.127, 0.166), (0.109, 0.142), (8.0, 11.0)  # mesh-llm, its issue 1236
ROUND_MS = 0.82  # measured, docs/design.md: this testbed's own round on loopback, a row on each of eight nodes, CURVE
# A layer of Mixtral on one machine, in ms: a token's two experts, and 128 tokens with all eight; by arithmetic or by
# reading the experts in fp16, whichever is slower. AGX Orin class: 20 TFLOP/s, 205 GB/s; Nano: 0.47 and 26.
WORK_MS = {"decode": (3.4, 27.1), "prefill": (13.7, 192.0)}

MEASURES = {
    "WLR 0.2, Eq. 8": ("wlr", "eq8_cut", ORANGE, "diamond"),
    "WLR 0.2, whole blocks": ("wlr", "prefill_cut", BLACK, "circle"),
    "allocation alone, whole blocks": ("topk", "prefill_cut", BLUE, "square"),
    "joint 0.05, whole blocks": ("joint", "prefill_cut", RED, "triangle-up"),
}


def settings(found: dict[str, Any]) -> Spec:
    """The same policies under each choice that the paper leaves open."""
    rows = [row for row in found["settings"] if row["policy"] != "topk" or row["bandwidth"] == "optimal"]
    points = [
        {"setting": row["setting"], "what": what, "x": 100 * row[key], "median": 100 * row[f"{key}_p50"]}
        for row in rows
        for what, (policy, key, _, _) in MEASURES.items()
        if row["policy"] == policy
    ]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    y = {"field": "setting", "type": "nominal", "sort": names, "title": None, "axis": {"grid": True, "labelLimit": 260}}
    scale = {"domain": [0, 72], "nice": False}
    x, median = axis("x", "cut against plain top-2 (%)", scale), axis("median", "", scale)
    what = {"field": "what", "type": "nominal", "title": None, "sort": None}
    domain = list(MEASURES)
    colour = {**what, "scale": {"domain": domain, "range": [m[2] for m in MEASURES.values()]}, "legend": wide_legend(4)}
    shape = {**what, "scale": {"domain": domain, "range": [m[3] for m in MEASURES.values()]}}
    shift = {"field": "what", "type": "nominal", "sort": domain, "scale": {"domain": domain, "paddingInner": 0.1}}
    place = {"y": y, "yOffset": shift, "color": colour}
    band = {"x": {"datum": LEAST, "type": "quantitative", "scale": scale}, "x2": {"datum": MOST}}
    return {
        "title": title(
            "What the paper leaves open decides the size of every cut",
            "Simulated, ten placements. Symbol: cut of the summed time; tick: median over draws.",
            "Shaded: what the paper reports for theta = 0.2 (Eq. 8, so for the orange diamonds).",
        ),
        "width": 620,
        "height": {"step": 9},
        "layer": [
            layer([{}], {"type": "rect", "color": ORANGE, "opacity": 0.16}, band),
            layer(points, {"type": "rule", "strokeWidth": 1.5}, {**place, "x": x, "x2": {"field": "median"}}),
            layer(points, {**POINT, "size": 55}, {**place, "x": x, "shape": shape}),
            layer(points, {"type": "tick", "thickness": 1.5, "size": 7}, {**place, "x": median}),
        ],
    }


def snr(found: dict[str, Any]) -> Spec:
    """How strong links must be for the paper's cuts."""
    points = [
        {"devices": row["devices"], "of": of, "x": row["snr_db"], "y": 100 * row[key]}
        for row in found["snr"]
        for of, key in (("summed time", "eq8_cut"), ("median over draws", "eq8_cut_p50"))
    ]
    ours = next(row["snr_db"] for row in found["snr"] if row["noise_figure_db"] == 7)
    x = axis("x", "median SNR of all links at the even split (dB)", {"domain": [3, 45], "nice": False})
    y = axis("y", "cut of Eq. 8 latency, WLR 0.2 (%)", {"domain": [0, 85]})
    colour = {"field": "devices", "type": "nominal", "title": "devices", "scale": {"range": [BLUE, RED]}}
    line = {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeColor": "#222"}
    dash = {"field": "of", "type": "nominal", "title": "cut of the", "sort": None, "legend": line}
    band = {"y": {"datum": LEAST, "type": "quantitative"}, "y2": {"datum": MOST}}
    place = {"x": x, "y": y, "color": colour}
    here = [{"x": ours, "y": 80, "name": "this page's setting", "colour": "#444"}]
    return {
        "title": title(
            "The paper's cuts ask for weaker links than ours",
            "Simulated, ten placements, noise figures from 0 to 37 dB (ours: 7). Shaded: what the paper reports.",
        ),
        "width": 520,
        "height": 300,
        "layer": [
            layer([{}], {"type": "rect", "color": ORANGE, "opacity": 0.16}, band),
            layer(points, {"type": "line", "strokeWidth": 2.2}, {**place, "strokeDash": dash}),
            layer(points, POINT, place),
            layer(here, {"type": "rule", "color": GREY, "strokeDash": [3, 3]}, {"x": x}),
            named(here, x, y, align="right", dx=-6),
        ],
    }


def break_even(found: dict[str, Any]) -> Spec:
    """Up to which round trip it pays to compute a layer's experts in several places at once."""
    work = [0.05, 500.0]
    lines = [
        {"parts": name, "work": x, "rtt": share * x}
        for name, share in (("2 at once (a decoded token)", 1 / 2), ("7 at once (mesh-llm's N)", 6 / 7))
        for x in work
    ]
    air = found["air_ms"]
    spans = [
        span("mesh-llm: break-even it states, 0.109-0.142 ms", MESH_WORK_MS, MESH_RTT_MS, RED),
        span("mesh-llm: its LAN as it reports, 8-11 ms", MESH_WORK_MS, (MESH_LAN_MS[0], MESH_LAN_MS[1]), RED),
        span("decode, a token: air", WORK_MS["decode"], (air["decode"],) * 2, BLUE),
        span("prefill, 128 tokens: air", WORK_MS["prefill"], (air["prefill"],) * 2, BLUE),
    ]
    x = axis("work", "expert work of one layer on one machine (ms)", {"type": "log", "domain": work}, values=DECADES)
    y = axis("rtt", "round trip of the layer (ms)", {"type": "log", "domain": [0.05, 200.0]}, values=DECADES)
    dash = {"field": "parts", "type": "nominal", "title": "break-even, equal parts", "legend": {"orient": "top-left"}}
    paid = [{"work": w, "rtt": 6 / 7 * w, "least": 0.05} for w in (0.0584, 233.3)] + [
        {"work": 500.0, "rtt": 200.0, "least": 0.05}
    ]
    ends = {
        "x": x,
        "y": y,
        "x2": {"field": "work_to"},
        "y2": {"field": "rtt_to"},
        "color": {"field": "colour", "scale": None},
    }
    software = [
        {
            "rtt": ROUND_MS,
            "work": 480.0,
            "name": f"this testbed's software on loopback, measured: {ROUND_MS} ms",
            "colour": "#444",
        }
    ]
    return {
        "title": title(
            "When a layer's experts are better computed elsewhere: below the lines",
            "A layer of work W takes W on one machine, round trip + W / parts on several like it.",
            "Blue: Mixtral's sizes, simulated air time (median), against one board, AGX Orin's to Nano's class.",
        ),
        "width": 640,
        "height": 400,
        "layer": [
            layer(paid, {"type": "area", "color": GREEN, "opacity": 0.1}, {"x": x, "y": y, "y2": {"field": "least"}}),
            layer(
                lines,
                {"type": "line", "color": GREEN, "strokeWidth": 2, "clip": True},
                {"x": x, "y": y, "strokeDash": dash},
            ),
            layer(software, {"type": "rule", "color": GREY, "strokeDash": [2, 3]}, {"y": y}),
            named(software, x, y, align="right", dy=-8),
            layer(spans, {"type": "rect", "opacity": 0.85, "cornerRadius": 2}, {**ends}),
            named([*spans[:2], spans[3]], x, y, dx=2, dy=-11),
            named([spans[2]], x, y, dx=2, dy=18),
        ],
    }


def span(name: str, work_ms: tuple[float, float], rtt_ms: tuple[float, float], colour: str) -> dict[str, Any]:
    """A rectangle in the break-even picture; at least a stroke thick."""
    low, high = rtt_ms
    high = max(high, 1.06 * low)
    return {"name": name, "work": work_ms[0], "work_to": work_ms[1], "rtt": high, "rtt_to": low, "colour": colour}
