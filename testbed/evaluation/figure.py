"""Accuracy against latency, a panel per task: the question of the paper's Table I and Fig. 3 in one picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from testbed.evaluation.results import ALL, EvaluationResults
from testbed.report.figure import LOOK, SHAPES, Spec, facet, policy_colours, quantity
from testbed.runlog.segment import new_file

NAME = "accuracy"
SCALE = 2.0  # pixels of the PNG per pixel of the picture
PANELS_PER_ROW = 3
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


def write_figure(results: EvaluationResults, folder: Path) -> list[Path]:
    """Write accuracy.png and accuracy.svg. Raises ModuleNotFoundError (vl_convert, an extra)."""
    import vl_convert  # noqa: PLC0415

    spec = accuracy_spec(results)
    png, svg = (folder / f"{NAME}.{kind}" for kind in ("png", "svg"))
    with new_file(png) as temporary:
        temporary.write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
    with new_file(svg) as temporary:
        temporary.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    return [png, svg]


def accuracy_spec(results: EvaluationResults) -> Spec:
    """The picture as Vega-Lite wants it. The horizontal axis is all prefill blocks' time against the first policy's."""
    first_s = {row.task: row.prefill_block_sum_s for row in results.rows if row.policy == results.policies[0]}
    values = [
        {key: 100 * value if key.startswith("accuracy") and value is not None else value for key, value in row.items()}
        | {"latency": 100 * float(row["prefill_block_sum_s"]) / first_s[str(row["task"])]}
        for row in map(asdict, results.rows)
    ]
    tasks = [task for task in results.tasks if task != ALL] + ([ALL] if ALL in results.tasks else [])
    x = quantity("latency", f"prefill latency, % of {results.policies[0]}", {"zero": False, "padding": 16}, tickCount=5)
    y = quantity("accuracy", "accuracy, % (95 %)", {"zero": False, "padding": 10})
    shape = {
        "field": "policy",
        "type": "nominal",
        "title": None,
        "scale": {"domain": results.policies, "range": SHAPES},
    }
    colour = {"field": "policy", "type": "nominal", "title": None, "scale": policy_colours(results.policies)}
    interval = {"y": {**y, "field": "accuracy_low"}, "y2": {"field": "accuracy_high"}}
    rule, point = {"type": "rule", "strokeWidth": 1.4, "opacity": 0.55}, {"type": "point", "size": 90, "filled": True}
    layers = [
        {"mark": rule, "encoding": {"x": x, **interval, "color": colour}},
        {"mark": point, "encoding": {"x": x, "y": y, "color": colour, "shape": shape}},
    ]
    return {
        "$schema": SCHEMA,
        "title": {
            "text": "Accuracy against latency, left and up is better",
            "subtitle": _provenance(results),
        },
        "data": {"values": values},
        "facet": facet("task", tasks),
        "columns": min(len(tasks), PANELS_PER_ROW),
        "spec": {"width": 240, "height": 200, "layer": layers},
        "resolve": {"scale": {"y": "independent"}},
        "config": LOOK,
    }


def _provenance(results: EvaluationResults) -> str:
    links = f"links: {results.overall.links}"
    return links if results.overall.valid else f"{links}; INVALID: see the table"
