"""The tables of docs/paper.md, as Markdown: what `paper_study.py` found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from testbed.sweep.table import row_label

Rows = list[dict[str, Any]]


def print_tables(found: dict[str, Any]) -> None:
    policies = found["policies"]
    rows = [
        [row_label(row), *_cuts(row), *_quality(row, policies[0]), _percent(row["kept_fraction"])] for row in policies
    ]
    _table(f"Policies, {found['draws']} draws of {found['placements']} placements", CUTS + QUALITY + ["kept"], rows)
    algorithm = found["algorithm_1"]
    rows = [[row_label(row), *_cuts(row), *_quality(row, algorithm[0])] for row in algorithm]
    _table("Readings of Algorithm 1", CUTS + QUALITY, rows)
    rows = [[row_label(row), *_cuts(row)] for row in found["weaker"]]
    _table("Weaker links", CUTS, rows)
    _table("Settings", SETTING, _settings(found["settings"]))
    rows = [[row["devices"], str(row["noise_figure_db"]), f"{row['snr_db']:.1f}", *_cuts(row)] for row in found["snr"]]
    _table("WLR 0.2 on weaker links", ["noise figure dB", "median SNR dB", *CUTS], rows)
    print("\nmedian ms on the air:", found["air_ms"])


CUTS = ["block cut (95 %)", "median", "Eq. 8 cut (95 %)", "median", "Eq. 8, single placements"]
QUALITY = ["perplexity", "change", "accuracy"]
SETTING = [
    "topk ms/block p50", "WLR 0.2: block cut", "median", "Eq. 8 cut", "median", "single placements", "perplexity",
    "allocation: block cut", "median", "joint 0.05: block cut", "median", "perplexity",
]  # fmt: skip


def _cuts(row: dict[str, Any]) -> list[str]:
    return [
        _interval(row, "prefill_cut"),
        _percent(row["prefill_cut_p50"]),
        _interval(row, "eq8_cut"),
        _percent(row["eq8_cut_p50"]),
        _span(row["eq8_cut_of_placement"]),
    ]


def _quality(row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    return [f"{row['perplexity']:.3f}", _change(row, reference), _percent(row["accuracy"], 2)]


def _settings(rows: Rows) -> Iterable[list[str]]:
    for name in dict.fromkeys(row["setting"] for row in rows):
        topk, wlr, *rest = (row for row in rows if row["setting"] == name)
        cells = [
            name, f"{1e3 * topk['prefill_block_p50_s']:.1f}", _interval(wlr, "prefill_cut"),
            _percent(wlr["prefill_cut_p50"]), _interval(wlr, "eq8_cut"), _percent(wlr["eq8_cut_p50"]),
            _span(wlr["eq8_cut_of_placement"]), _change(wlr, topk),
        ]  # fmt: skip
        for row in rest:
            cells += [_interval(row, "prefill_cut"), _percent(row["prefill_cut_p50"])]
        yield cells + ([_change(rest[-1], topk)] if rest else ["-"] * 5)


def _table(title: str, heads: list[str], rows: Iterable[list[str]]) -> None:
    print(f"\n## {title}\n")
    for cells in ["", *heads], ["---"] * (len(heads) + 1), *rows:
        print("| " + " | ".join(cells) + " |")


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _interval(row: dict[str, Any], key: str) -> str:
    return f"{_percent(row[key])} ({100 * row[key + '_low']:.1f} to {100 * row[key + '_high']:.1f})"


def _span(values: list[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}"


def _change(row: dict[str, Any], reference: dict[str, Any]) -> str:
    return f"{100 * (row['perplexity'] / reference['perplexity'] - 1):+.2f} %"
