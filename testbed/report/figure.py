"""What a figure is, and one look for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

# Okabe and Ito's colours, told apart by the colour-blind too; yellow, which is faint on white, is left out.
BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED = "#1a1a1a", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = [BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
MANY = {"scheme": {"name": "viridis", "extent": [0.0, 0.9]}}  # without its end in yellow
GREY, PALE = "#8a8f98", "#c9cdd3"
PHASE_COLOURS = {
    "down": SKY, "queue": PALE, "dequantise": PINK, "compute": ORANGE, "quantise": RED, "up": GREEN,
    "select": BLUE, "group": SKY, "send": GREEN, "combine": ORANGE, "record": GREY,
}  # fmt: skip
PAGE_FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the report. `spec` is None where the log holds nothing to draw, and `finding` then says so."""

    name: str  # of its files
    title: str
    finding: str  # what it shows of this run, in one or two sentences
    reading: str  # how to read it
    spec: Spec | None
    queries: tuple[str, ...]  # for `testbed logs query`: they give every number of the figure

    def complete_spec(self) -> Spec:
        """The figure with its look, as Vega-Lite draws it. Raises ValueError where there is nothing to draw."""
        if self.spec is None:
            raise ValueError(f"figure {self.name}: {self.finding}")
        return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **self.spec, "config": LOOK}


def quantity(field: str, title: str | None, scale: Spec | None = None, **axis: Any) -> Spec:
    """An axis of numbers."""
    return {"field": field, "type": "quantitative", "title": title, "scale": scale or {}, "axis": axis}


def names(field: str, order: Sequence[str], title: str | None = None, **more: Any) -> Spec:
    """A channel of names, in their own order."""
    return {"field": field, "type": "nominal", "sort": list(order), "title": title, **more}


def coloured(field: str, colours: Mapping[str, str], title: str | None = None, **legend: Any) -> Spec:
    """A channel of names, each in its colour; the legend stands above the plots."""
    scale = {"domain": list(colours), "range": list(colours.values())}
    return {"field": field, "type": "nominal", "title": title, "scale": scale, "legend": {**LEGEND_ABOVE, **legend}}


def facet(field: str, order: Sequence[str], title: str | None = None) -> Spec:
    """Small plots side by side, each under its name."""
    header = {"labelFontSize": 12, "labelFontWeight": 600, "labelAnchor": "start", "labelColor": "#1f2328"}
    return names(field, order, title, header={**header, "labelPadding": 6})


def hint(field: str, title: str, form: str | None = None) -> Spec:
    """A line of what shows up under the pointer."""
    kind = "nominal" if form is None else "quantitative"
    return {"field": field, "title": title, "type": kind, **({} if form is None else {"format": form})}


def choice(name: str, label: str, options: Sequence[str]) -> Spec:
    """A menu beside the figure; the first option is what the PNG and SVG show."""
    menu = {"input": "select", "options": list(options), "name": f"{label} "}
    return {"name": name, "value": options[0], "bind": menu}


def known(layer: Spec, values: Sequence[Mapping[str, Any]], field: str) -> list[Spec]:
    """The layer over those values that have `field`; none where no value has: an empty layer has no scale."""
    if not any(value.get(field) is not None for value in values):
        return []
    return [{**layer, "transform": [{"filter": f"isValid(datum.{field})"}]}]


def policy_colours(policies: Sequence[str]) -> Spec:
    colours: Spec = {"range": PALETTE[: len(policies)]} if len(policies) <= len(PALETTE) else MANY
    return {"domain": list(policies), **colours}


LEGEND_ABOVE: Spec = {"orient": "top", "direction": "horizontal", "columns": 8, "offset": 10, "titleOrient": "left"}
_TEXT = {"labelFontSize": 12, "titleFontSize": 12.5, "labelColor": "#3d444d", "titleColor": "#3d444d"}
LOOK: Spec = {
    "background": "#ffffff",
    "font": "Liberation Sans, Arial, Helvetica Neue, Helvetica, sans-serif",
    "padding": {"left": 4, "right": 12, "top": 6, "bottom": 6},
    "axis": {
        **_TEXT,
        "titleFontWeight": "normal",
        "titlePadding": 9,
        "labelPadding": 5,
        "gridColor": "#eceef1",
        "domainColor": "#b4bac2",
        "tickColor": "#b4bac2",
        "tickSize": 4,
    },
    "legend": {**_TEXT, "titleFontWeight": "normal", "symbolSize": 110, "labelLimit": 260, "columnPadding": 16},
    "header": {"titleColor": "#3d444d", "titleFontWeight": "normal"},
    "title": {"fontSize": 13, "fontWeight": 600, "anchor": "start", "color": "#1f2328", "offset": 8},
    "view": {"stroke": "#dde1e6"},
    "bar": {"cornerRadius": 0},
    "facet": {"spacing": 22},
    "concat": {"spacing": 34},
}
