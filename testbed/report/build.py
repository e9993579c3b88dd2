"""From a run's folder to its report: the page, and each figure as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import vl_convert

from testbed.report import boards, estimates, experts, incidents, links, phases, quality, timeline
from testbed.report.data import RunData
from testbed.report.figure import Figure
from testbed.report.head import head
from testbed.report.page import page
from testbed.runlog.segment import new_file

PNG_SCALE = 2.0  # pixels of the PNG per pixel of the figure
GLOBALS = "window.vegaEmbed = vegaEmbed;"
FIGURES: tuple[Callable[[RunData], Figure], ...] = (
    quality.figure,
    timeline.figure,
    phases.at_nodes,
    phases.at_station,
    estimates.over_time,
    estimates.errors,
    experts.per_layer,
    experts.per_node,
    links.figure,
    boards.figure,
    incidents.figure,
)


def figures_of(data: RunData) -> list[Figure]:
    """Every figure of the report, in its order; those the log has nothing for say so."""
    return [figure(data) for figure in FIGURES]


def write_page(data: RunData, figures: Sequence[Figure], out: Path) -> Path:
    """Write the report, one HTML file. Raises RunLogError where it cannot be written or the log is damaged."""
    of_policies = quality.policy_figures(data)
    text = page(head(data, of_policies), of_policies, figures, _library())
    with new_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, once for all charts: bundling takes seconds."""
    return vl_convert.javascript_bundle(GLOBALS)


def write_images(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg of every figure that has something to draw. Raises RunLogError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        if figure.spec is None:
            continue
        spec = figure.complete_spec()
        png, svg = folder / f"{figure.name}.png", folder / f"{figure.name}.svg"
        with new_file(png) as temporary:
            temporary.write_bytes(vl_convert.vegalite_to_png(spec, scale=PNG_SCALE))
        with new_file(svg) as temporary:
            temporary.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        written += [png, svg]
    return written
