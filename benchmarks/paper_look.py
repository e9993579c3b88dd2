"""What the figures of docs/paper.md share: pieces of Vega-Lite, and one look for all."""

from __future__ import annotations

from typing import Any

from paper_tables import Rows

from testbed.sweep.plots import COLOURS, FONT, SHAPES

Spec = dict[str, Any]

BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED = COLOURS
SEVEN_SHAPES = SHAPES[:7]
GREY = "#777777"


def axis(field: str, name: str, scale: Spec | None = None, **look: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": name, "scale": scale or {}, "axis": look}


def layer(values: Rows, mark: Spec, encoding: Spec) -> Spec:
    return {"data": {"values": values}, "mark": mark, "encoding": encoding}


def panel(*layers: Spec) -> Spec:
    return {"width": 310, "height": 330, "layer": list(layers)}


def title(text: str, *more: str) -> Spec:
    return {"text": text, "subtitle": list(more)}


def named(names: Rows, x: Spec, y: Spec, **mark: Any) -> Spec:
    """Names beside what they name, each in its colour, legible on any line."""
    text = {"type": "text", "align": "left", "fontSize": 13, "fontWeight": "bold", **mark}
    place = {"x": x, "y": y, "text": {"field": "name"}}
    halo = {"mark": {**text, "stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}, "encoding": place}
    ink = {"mark": text, "encoding": {**place, "color": OWN_COLOUR}}
    return {"data": {"values": names}, "layer": [halo, ink]}


def wide_legend(columns: int) -> Spec:
    return {"orient": "bottom", "columns": columns, "labelLimit": 400}


OWN_COLOUR: Spec = {"field": "colour", "type": "nominal", "scale": None}
POINT: Spec = {"type": "point", "filled": True, "size": 60, "opacity": 1}
DECADES = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
BENCHMARKS = ["MMLU", "PIQA", "ARC-E", "ARC-C", "HumanEval", "GSM-8K", "BoolQ"]
# What the paper reports (Section IV-B) as cut of Eq. 8 latency, in percent, by theta and in the order of BENCHMARKS.
PAPER_CUT = {0.2: [25.59, 20.08, 25.33, 16.2, 37.54, 30.21, 21.86], 0.3: [None, 100 * (1 - 1 / 1.65)]}
BY_BENCHMARK: Spec = {
    "field": "benchmark",
    "type": "nominal",
    "title": "the paper's",
    "scale": {"domain": BENCHMARKS, "range": SHAPES[:7]},
    "legend": {"symbolFillColor": ORANGE, "symbolStrokeColor": ORANGE},
}
THETA = axis("theta", "threshold theta", {"domain": [0, 0.31], "nice": False}, values=[0, 0.1, 0.2, 0.3], format="~g")
_TEXT = {"labelFontSize": 13, "titleFontSize": 14, "labelColor": "#222", "titleColor": "#222"}
LOOK: Spec = {
    "background": "#ffffff",
    "font": FONT,
    "padding": 16,
    "axis": {**_TEXT, "gridColor": "#e4e4e4", "domainColor": "#888", "tickColor": "#888", "titleFontWeight": "normal"},
    "legend": {**_TEXT, "titleFontWeight": "normal", "symbolSize": 90, "labelLimit": 320, "rowPadding": 5},
    "title": {"fontSize": 18, "subtitleFontSize": 13, "subtitleColor": "#444", "anchor": "start", "offset": 14},
    "view": {"stroke": "#cccccc"},
}
