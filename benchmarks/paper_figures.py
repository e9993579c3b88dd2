"""The figures of docs/paper.md, as Vega-Lite: what `paper_study.py` found, beside what the paper reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper_choices import break_even, settings, snr
from paper_look import (
    BENCHMARKS,
    BLACK,
    BLUE,
    BY_BENCHMARK,
    DECADES,
    GREEN,
    LOOK,
    ORANGE,
    OWN_COLOUR,
    PAPER_CUT,
    PINK,
    POINT,
    RED,
    SEVEN_SHAPES,
    SKY,
    THETA,
    Spec,
    axis,
    layer,
    named,
    panel,
    title,
)
from paper_png import compact
from paper_tables import Rows

from testbed.runlog.segment import new_file

SCALE = 1.6  # pixels of a PNG per pixel of the picture
# Table I of the paper, in percent, Mixtral first, then theta 0.1, 0.2, 0.3.
PAPER_ACCURACY = {
    "MMLU": [70.0, 70.3, 68.8, 68.2],
    "PIQA": [83.2, 83.7, 84.1, 83.7],
    "ARC-E": [92.8, 92.2, 91.4, 88.9],
    "ARC-C": [84.8, 88.1, 86.8, 80.7],
    "HumanEval": [47.6, 48.8, 47.0, 45.7],
    "GSM-8K": [70.9, 71.0, 72.0, 68.6],
    "BoolQ": [88.72, 88.38, 88.59, 87.06],
}


def write_figures(found: dict[str, Any], folder: Path) -> list[Path]:
    """A PNG and an SVG of each figure. Raises ModuleNotFoundError (vl_convert)."""
    import vl_convert

    figures: dict[str, Callable[[dict[str, Any]], Spec]] = {
        "fig3": fig3, "pareto": pareto, "settings": settings, "snr": snr, "break_even": break_even
    }  # fmt: skip
    paths = []
    for name, figure in figures.items():
        spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "config": LOOK, **figure(found)}
        png, svg = (folder / f"{name}.{kind}" for kind in ("png", "svg"))
        with new_file(png) as temporary:
            temporary.write_bytes(compact(vl_convert.vegalite_to_png(spec, scale=SCALE)))
        with new_file(svg) as temporary:
            temporary.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        paths += [png, svg]
    return paths


def fig3(found: dict[str, Any]) -> Spec:
    """The paper's Fig. 3 over theta: latency cut, and what it does to quality."""
    return {
        "title": title(
            "Algorithm 1 (WLR) over its threshold: ours beside the paper's Fig. 3 and Table I",
            "Latency: simulated, bands 95 % over ten placements. Quality: theirs Mixtral-8x7B on benchmarks, ours a",
            "demo model on held-out Python source, measured in process: shapes can be compared, levels cannot.",
        ),
        "hconcat": [_cuts_over_theta(found), _accuracy_over_theta(found), _perplexity_over_theta(found)],
        "spacing": 24,
    }


CURVES = {  # name: of which rows, what, in which colour, and where it is named
    "ours: Eq. 8, links 13 dB weaker": ("weaker", "eq8_cut", SKY, (0.005, 48)),
    "ours: whole blocks": ("policies", "prefill_cut", BLACK, (0.025, 26)),
    "ours: Eq. 8": ("policies", "eq8_cut", BLUE, (0.19, 8.5)),
}


def _cuts_over_theta(found: dict[str, Any]) -> Spec:
    curves = [
        {"colour": colour, **over_theta(row), **with_interval(row, key)}
        for rows, key, colour, _ in CURVES.values()
        for row in wlr_rows(found[rows])
    ]
    names = [{"name": name, "colour": c, "theta": x, "y": y} for name, (_, _, c, (x, y)) in CURVES.items()]
    points = [
        {"theta": theta, "y": cut, "benchmark": benchmark}
        for theta, cuts in PAPER_CUT.items()
        for benchmark, cut in zip(BENCHMARKS, cuts, strict=False)
        if cut is not None
    ]
    y = axis("y", "cut of the latency against plain top-2 (%)", {"domain": [0, 55]}, tickCount=6)
    band = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    return panel(
        layer(curves, {"type": "area", "opacity": 0.15}, {"x": THETA, **band, "color": OWN_COLOUR}),
        layer(curves, {"type": "line", "strokeWidth": 2.4}, {"x": THETA, "y": y, "color": OWN_COLOUR}),
        layer(points, POINT, {"x": THETA, "y": y, "shape": BY_BENCHMARK, "color": {"value": ORANGE}}),
        named(names, THETA, y),
    )


def _accuracy_over_theta(found: dict[str, Any]) -> Spec:
    paper = [
        {"benchmark": name, "theta": step / 10, "y": value - values[0]}
        for name, values in PAPER_ACCURACY.items()
        for step, value in enumerate(values)
    ]
    rows = wlr_rows(found["policies"])
    ours = [{**over_theta(row), "y": 100 * (row["accuracy"] - rows[0]["accuracy"])} for row in rows]
    y = axis("y", "accuracy against plain top-2 (points)")
    place = {"x": THETA, "y": y}
    names = [
        {"name": "ours: next token", "colour": BLACK, "theta": 0.01, "y": -2.2},
        {"name": "the paper's benchmarks", "colour": "#9a6700", "theta": 0.115, "y": 3.3},
    ]
    by_benchmark = {**place, "color": {"value": ORANGE}, "detail": {"field": "benchmark"}}
    return panel(
        layer(paper, {"type": "line", "strokeWidth": 1.2, "opacity": 0.7}, by_benchmark),
        layer(paper, POINT, {**place, "color": {"value": ORANGE}, "shape": BY_BENCHMARK}),
        layer(ours, {"type": "line", "strokeWidth": 3, "color": BLACK}, place),
        named(names, THETA, y),
    )


READINGS = {
    "wlr": ("divided by their sum", BLACK, (0.03, 1.1)),
    "examples.readings:WLRSoftmax": ("literal softmax", RED, (0.07, 4.1)),
}


def _perplexity_over_theta(found: dict[str, Any]) -> Spec:
    rows = [row for row in found["algorithm_1"] if row["policy"] in READINGS and row["params"]["theta"] <= 0.3]
    curves = [{"colour": READINGS[row["policy"]][1], **over_theta(row), "y": change(row, found)} for row in rows]
    names = [{"name": name, "colour": c, "theta": x, "y": y} for name, c, (x, y) in READINGS.values()]
    y = axis("y", "perplexity against plain top-2 (%), ours", tickCount=6)
    line = {"type": "line", "strokeWidth": 2.4, "point": True}
    return panel(layer(curves, line, {"x": THETA, "y": y, "color": OWN_COLOUR}), named(names, THETA, y))


FAMILIES = {
    "top-2, band shared out per block": BLUE,
    "WLR (the paper's)": BLACK,
    "WLR, band shared out per block": SKY,
    "load-aware": GREEN,
    "joint": RED,
    "substitute": PINK,
    "dropping what is late (hivemind's)": ORANGE,
}


BESIDE = ("load-aware", "joint")  # curves whose labels stand above and left of them, to be legible


def family(row: dict[str, Any]) -> str | None:
    """The curve that a policy is a point of."""
    allocated = row["bandwidth"] != "even"
    families = list(FAMILIES)
    by_name = {"wlr": families[1 + allocated], "load_aware": families[3], "joint": families[4]}
    by_name |= {"substitute": families[5], "drop_late": families[6]}
    if row["policy"] == "topk":
        return families[0] if allocated and strength(row) == "optimal" and row["period"] == "block" else None
    return by_name[row["policy"]]


def strength(row: dict[str, Any]) -> str:
    params, name = row["params"], row["policy"]
    if name == "topk":
        return row["bandwidth"]
    if name == "drop_late":
        return f"+{1e3 * params['after_s']:g} ms"
    return f"{params.get('theta', params.get('budget')):g}"


def pareto(found: dict[str, Any]) -> Spec:
    """What each policy cuts of a block's time, and what that costs."""
    rows = [row for row in found["policies"] if family(row)]
    points = [
        {
            "family": family(row), "label": strength(row), "x": change(row, found),
            **with_interval(row, "prefill_cut"),
        }
        for row in rows
    ]  # fmt: skip
    scale = {"type": "symlog", "constant": 0.5, "domain": [-0.3, 200], "nice": False, "padding": 8}
    x = axis(
        "x",
        "change of perplexity against plain top-2 (%; the scale is finer near 0)",
        scale,
        values=[0, 0.5, *DECADES[3:11]],
        format="~r",
    )
    y = axis("y", "cut of a block's time against plain top-2 (%)", {"domain": [0, 62], "nice": False})
    names = {"field": "family", "type": "nominal", "title": None}
    colour = {**names, "scale": {"domain": list(FAMILIES), "range": list(FAMILIES.values())}}
    shape = {**names, "scale": {"domain": list(FAMILIES), "range": SEVEN_SHAPES}}
    place = {"x": x, "y": y, "color": colour}
    bar = {"x": x, "y": axis("low", y["title"]), "y2": {"field": "high"}, "color": colour}
    return {
        "title": title(
            "Latency against quality: higher and further left is better",
            "Simulated prefill in the paper's setting, bars: 95 % over ten placements; perplexity measured in process.",
            "Labels: theta, budget of gate mass, or how long late answers are waited for. Blue: output unchanged.",
        ),
        "width": 720,
        "height": 430,
        "layer": [
            layer(points, {"type": "line", "strokeWidth": 1.6, "opacity": 0.7}, place),
            layer(points, {"type": "rule", "opacity": 0.8}, bar),
            layer(points, {**POINT, "size": 80}, {**place, "shape": shape}),
            *_labels(points, place),
        ],
    }


def _labels(points: Rows, place: Spec) -> list[Spec]:
    """The strength of every point."""
    below = {"type": "text", "dx": 8, "dy": 11, "align": "left", "fontSize": 11}
    above = {**below, "dx": -8, "dy": -8, "align": "right"}
    strengths = {**place, "text": {"field": "label"}}
    aside = [point for point in points if point["family"] in BESIDE]
    return [
        layer([p for p in points if p not in aside], below, strengths),
        layer(aside, above, strengths),
    ]


def wlr_rows(rows: Rows) -> Rows:
    """Plain top-2 as theta 0, and WLR up to the paper's largest theta, at the even split."""
    wanted = [row for row in rows if row["bandwidth"] == "even" and row["policy"] in ("topk", "wlr")]
    return [row for row in wanted if row["params"].get("theta", 0) <= 0.3]


def over_theta(row: dict[str, Any]) -> dict[str, float]:
    return {"theta": row["params"].get("theta", 0.0)}


def with_interval(row: dict[str, Any], key: str) -> dict[str, float]:
    return {"y": 100 * row[key], "low": 100 * row[f"{key}_low"], "high": 100 * row[f"{key}_high"]}


def change(row: dict[str, Any], found: dict[str, Any]) -> float:
    """Of perplexity against plain top-2, in percent."""
    return 100 * (row["perplexity"] / found["policies"][0]["perplexity"] - 1)
