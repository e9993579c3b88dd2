"""The page: one HTML file that asks no network for anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from testbed.report.figure import Figure
from testbed.report.head import INVALID, VALID, Head
from testbed.report.quality import PolicyQuality
from testbed.runlog.catalog import State

TEMPLATE = Path(__file__).with_name("page.html")
# No address is ever asked for; Vega compiles its expressions, which needs unsafe-eval.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'none'; base-uri 'none'; form-action 'none'"
)
SETTLED = {State.FINISHED: "good", State.RUNNING: "plain"}
VERDICTS = {VALID: "good", INVALID: "bad"}


def page(head: Head, quality: Sequence[PolicyQuality], figures: Sequence[Figure], library: str) -> str:
    """The report as HTML. `library`: the JavaScript of Vega, Vega-Lite and Vega-Embed."""
    parts = {
        "@POLICY@": POLICY,
        "@TITLE@": escape(head.run.run),
        "@HEAD@": _head(head),
        "@POLICIES@": _policies(quality),
        "@CONTENTS@": "".join(f'<li><a href="#{one.name}">{escape(one.title)}</a></li>' for one in figures),
        "@FIGURES@": "\n".join(_figure(number, one) for number, one in enumerate(figures, 1)),
        "@LIBRARY@": library.replace("</script", "<\\/script"),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    pieces = [(place, text.index(place)) for place in parts]
    for place, _ in sorted(pieces, key=lambda piece: piece[1], reverse=True):  # from behind: no part is looked into
        before, after = text[: text.index(place)], text[text.index(place) + len(place) :]
        text = before + parts[place] + after
    return text


def _head(head: Head) -> str:
    began = "" if head.run.began is None else f"{head.run.began:%-d %B %Y, %H:%M} UTC"
    badges = _badge(head.run.state.value, SETTLED.get(head.run.state, "bad"))
    badges += _badge(head.verdict, VERDICTS.get(head.verdict, "plain"))
    notes = "".join(f'<p class="notice">{escape(sentence)}</p>' for sentence in head.sentences)
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in head.tiles)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in head.facts)
    return (
        f'<p class="kicker">Run report<span>{escape(began)}</span></p>\n<h1>{escape(head.run.run)}</h1>\n'
        f'<p class="badges">{badges}</p>\n{notes}\n<div class="tiles">{tiles}</div>\n'
        f'<dl class="facts">{facts}</dl>\n{_sql([head.query])}'
    )


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _policies(quality: Sequence[PolicyQuality]) -> str:
    """The policies' table: the figure's numbers, to read off."""
    heads = (
        "policy",
        "ms per block",
        "cut",
        "95 % interval",
        "perplexity",
        "next token right",
        "pairs kept",
        "orphaned",
    )
    rows = [
        (
            escape(one["policy"]), _told(one["block_ms"], ".2f"), _told(one["cut"], ".1%"), _interval(one),
            _told(one["perplexity"], ".3f"), _told(one["accuracy"], ".1%"), _told(one["kept"], ".1%"),
            str(one["orphaned"]),
        )
        for one in (figures.document() for figures in quality)
    ]  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in heads)}</tr></thead><tbody>{body}</tbody></table>"
    )


def _told(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("%", " %").replace("-", "−")


def _interval(one: dict[str, Any]) -> str:
    if one["cut_low"] is None or one["cut_low"] == one["cut_high"]:
        return "–"
    return f"{_told(one['cut_low'], '.1%')} to {_told(one['cut_high'], '.1%')}"


def _figure(number: int, figure: Figure) -> str:
    heading = f'<h2><span>{number}</span>{escape(figure.title)}</h2>\n<p class="finding">{escape(figure.finding)}</p>'
    if figure.spec is None:
        return f'<section id="{figure.name}" class="absent">{heading}{_sql(figure.queries)}</section>'
    spec = json.dumps(figure.complete_spec(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (
        f'<section id="{figure.name}">{heading}\n<div class="chart" data-figure="{figure.name}"></div>\n'
        f'<script type="application/json" id="spec-{figure.name}">{_inside_script(spec)}</script>\n'
        f'<p class="reading">{escape(figure.reading)}</p>\n{_sql(figure.queries)}</section>'
    )


def _inside_script(text: str) -> str:
    """JSON in which no HTML can end the element it stands in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sql(queries: Sequence[str]) -> str:
    texts = "".join(f"<pre>{escape(query)}</pre>" for query in queries)
    what = "testbed logs query gives these numbers"
    return f"<details><summary>SQL</summary><p>{what}:</p>{texts}</details>"
