"""A sweep as a picture: latency against quality, with the Pareto front. Vega-Lite draws it, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testbed.runlog.segment import new_file
from testbed.sweep.grid import shown
from testbed.sweep.results import LATENCY, QUALITY, SweepResults
from testbed.sweep.table import row_label

PLOT = "pareto"
SCALE = 2.0  # pixels of the PNG per pixel of the picture
PANELS_PER_ROW = 3
LOG_FROM = 8.0  # latencies that differ more than so many times have a logarithmic axis
# Okabe and Ito's, told apart by the colour-blind too; black, for the unmodified model, comes first, and yellow, which
# is faint on white, is left out.
COLOURS = ["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
MANY_COLOURS = {"name": "viridis", "extent": [0.0, 0.9]}  # without its end in yellow
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
UNITS = {"hz": "Hz", "s": "s", "w": "W", "db": "dB", "ghz": "GHz", "m": "m", "bytes": "bytes"}

Spec = dict[str, Any]


def write_plots(results: SweepResults) -> list[Path]:
    """Write pareto.png and pareto.svg. None where no row has both figures. Raises ModuleNotFoundError (vl_convert)."""
    import vl_convert  # noqa: PLC0415  (an extra)

    points = plotted(results)
    if not points:
        return []
    spec = pareto_spec(results, points)
    png, svg = (results.out / f"{PLOT}.{kind}" for kind in ("png", "svg"))
    with new_file(png) as temporary:
        temporary.write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
    with new_file(svg) as temporary:
        temporary.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    return [png, svg]


def plotted(results: SweepResults) -> list[dict[str, Any]]:
    """What the picture shows of the rows: those that are valid and have both figures."""
    shape = next(iter(results.axes))
    return [
        {
            "policy": row_label(row),
            "shape": axis_value(shape, row[shape]),
            "panel": axis_value(results.panel_axis, row[results.panel_axis]) if results.panel_axis else "",
            "quality": row[QUALITY],
            "latency_ms": 1e3 * row[LATENCY],
            "pareto": row["pareto"],
        }
        for row in results.rows
        if row.get(QUALITY) is not None and row.get(LATENCY) is not None and row.get("valid", True)
    ]


def axis_value(axis: str, value: Any) -> str:
    """A value with its unit, where the axis' name ends in one: 100 MHz."""
    unit = UNITS.get(axis.rpartition("_")[2], "")
    if unit == "Hz" and isinstance(value, (int, float)) and value >= 1e6:
        value, unit = value / 1e6, "MHz"
    return f"{shown(value)} {unit}".strip()


def pareto_spec(results: SweepResults, points: list[dict[str, Any]]) -> Spec:
    """The picture as Vega-Lite wants it: a panel per value of the second axis, all on the same scales."""
    policies, shapes, panels = (list(dict.fromkeys(p[key] for p in points)) for key in ("policy", "shape", "panel"))
    panel: Spec = {"width": 640 if len(panels) == 1 else 290, "height": 400 if len(panels) == 1 else 330}
    panel["layer"] = [_front_line(points), _marks(points, next(iter(results.axes)), policies, shapes)]
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": points},
        "title": _title(results),
        "config": _look(),
    }
    if len(panels) == 1:
        return spec | panel
    facet = {"field": "panel", "type": "nominal", "sort": panels, "title": results.panel_axis}
    header = {"header": {"labelFontSize": 14, "labelFontWeight": "bold", "titleFontSize": 13, "titleColor": "#444"}}
    return spec | {"facet": facet | header, "columns": min(len(panels), PANELS_PER_ROW), "spec": panel}


def _position(points: list[dict[str, Any]]) -> Spec:
    latencies = [point["latency_ms"] for point in points]
    wide = min(latencies) > 0 and max(latencies) / min(latencies) > LOG_FROM
    y_scale: Spec = {"type": "log", "nice": False, "padding": 14} if wide else {"zero": False, "padding": 14}
    x_axis, y_axis = {"tickCount": 5}, {"tickCount": 6, "format": "~g"}
    return {
        "x": _quantitative("quality", "perplexity", {"zero": False, "nice": False, "padding": 14}, x_axis),
        "y": _quantitative("latency_ms", "prefill block time, median (ms)", y_scale, y_axis),
    }


def _quantitative(field: str, title: str, scale: Spec, axis: Spec) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _front_line(points: list[dict[str, Any]]) -> Spec:
    """Steps: what lies above and right of them is beaten."""
    return {
        "transform": [{"filter": "datum.pareto"}],
        "mark": {"type": "line", "interpolate": "step-after", "color": "#888888", "strokeWidth": 2, "opacity": 0.8},
        "encoding": _position(points) | {"order": {"field": "quality", "type": "quantitative"}},
    }


def _marks(points: list[dict[str, Any]], axis: str, policies: list[str], shapes: list[str]) -> Spec:
    colours: Spec = {"range": COLOURS} if len(policies) <= len(COLOURS) else {"scheme": MANY_COLOURS}
    policy = {"field": "policy", "type": "nominal", "title": "policy", "scale": {"domain": policies, **colours}}
    encoding = _position(points) | {
        "fill": policy,
        "stroke": policy,
        "fillOpacity": {"condition": {"test": "datum.pareto", "value": 0.85}, "value": 0.0},
        "strokeOpacity": {"condition": {"test": "datum.pareto", "value": 1.0}, "value": 0.75},
    }
    if len(shapes) <= len(SHAPES):
        scale = {"domain": shapes, "range": SHAPES[: len(shapes)]}
        legend = {"symbolStrokeColor": "#444", "symbolFillColor": "transparent"}
        encoding["shape"] = {"field": "shape", "type": "nominal", "title": axis, "scale": scale, "legend": legend}
    return {"mark": {"type": "point", "size": 110, "strokeWidth": 1.8}, "encoding": encoding}


def _title(results: SweepResults) -> Spec:
    return {
        "text": f"Latency against quality, {results.kind}: {results.name}",
        "subtitle": [results.provenance, "filled, on the line: Pareto front; lower and further left is better"],
    }


def _look() -> Spec:
    text = {"labelFontSize": 13, "titleFontSize": 14, "labelColor": "#222", "titleColor": "#222"}
    lines = {"gridColor": "#e4e4e4", "domainColor": "#888", "tickColor": "#888", "titlePadding": 10}
    title = {"fontSize": 18, "subtitleFontSize": 13, "subtitleColor": "#555", "anchor": "start", "offset": 16}
    return {
        "background": "#ffffff",
        "font": FONT,
        "padding": 16,
        "axis": {**text, **lines, "titleFontWeight": "normal"},
        "legend": {**text, "symbolSize": 110, "labelLimit": 260, "titleLimit": 260, "rowPadding": 5, "padding": 6},
        "title": title,
        "view": {"stroke": "#cccccc"},
    }
