"""Latency against quality: what every policy gained, and what it cost."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from testbed.experiment.statistics import CutInterval, paired_cut_interval
from testbed.report.data import Row, RunData
from testbed.report.figure import GREY, SHAPES, Figure, Spec, hint, known, policy_colours
from testbed.report.figure import quantity as number

READING = (
    "One mark per policy: further down is faster, further left is better. Block time is the mean over all prefill "
    "rounds of the same prompts, divided by the dilation; a vertical line is the 95 % interval of the cut against the "
    "first policy, by a bootstrap over prompts, paired, so what prompts have in common cancels. The dashed line is the "
    "first policy's time."
)


@dataclass(frozen=True, slots=True)
class PolicyQuality:
    """A policy's place in the figure. None where its workload had none of it."""

    policy: str
    block_ms: float
    cut: CutInterval  # against the first policy, over the same prompts
    perplexity: float | None
    accuracy: float | None  # share of next tokens that were predicted right
    kept: float | None  # share of the pairs (token, expert) that were computed
    orphaned: int

    def document(self) -> Row:
        low, high = (None if np.isnan(v) else float(v) for v in (self.cut.low, self.cut.high))
        cut = None if np.isnan(self.cut.cut) else float(self.cut.cut)
        return {
            "policy": self.policy, "block_ms": self.block_ms, "cut": cut, "cut_low": low, "cut_high": high,
            "perplexity": self.perplexity, "accuracy": self.accuracy, "kept": self.kept, "orphaned": self.orphaned,
        }  # fmt: skip


def queries(data: RunData) -> tuple[str, str, str]:
    """Block times by prompt, quality by policy, pairs kept by policy."""
    times = (
        "select policy, prompt, count(*) as blocks, sum(round_ns / dilation) / 1e6 as ms\n"
        f"from rounds where {data.here} and device = 0 and phase = 0\ngroup by all order by all"
    )
    nats, tokens, correct = (f"sum(cast(facts->>'$.{name}' as double))" for name in ("nats", "tokens", "correct"))
    quality = (
        f"select policy, exp({nats} / {tokens}) as perplexity, {correct} / {tokens} as accuracy\n"
        f"from events where {data.here} and kind = 'scored' group by policy order by policy"
    )
    kept = (
        "select policy, avg(case when kept then 1.0 else 0.0 end) as kept, sum(orphans) as orphaned\nfrom (\n"
        "  select policy, unnest(kept) as kept, case when orphaned then 1.0 / len(kept) else 0 end as orphans\n"
        f"  from tokens where {data.here}\n)\ngroup by policy order by policy"
    )
    return times, quality, kept


def policy_figures(data: RunData) -> list[PolicyQuality]:
    """Every policy that had a prefill, in the run's order; a run that was aborted has fewer prompts to compare."""
    times, scored, kept = (data.rows(query) for query in queries(data))
    prompt_ms = {p: {row["prompt"]: row["ms"] for row in times if row["policy"] == p} for p in _in_order(times)}
    blocks = {p: sum(row["blocks"] for row in times if row["policy"] == p) for p in prompt_ms}
    quality = {row["policy"]: row for row in scored}
    pairs = {row["policy"]: row for row in kept}
    return [
        PolicyQuality(
            policy=data.policy(policy),
            block_ms=sum(of_prompt.values()) / blocks[policy],
            cut=_cut(of_prompt, next(iter(prompt_ms.values()))),
            perplexity=quality.get(policy, {}).get("perplexity"),
            accuracy=quality.get(policy, {}).get("accuracy"),
            kept=pairs.get(policy, {}).get("kept"),
            orphaned=round(pairs.get(policy, {}).get("orphaned") or 0),
        )
        for policy, of_prompt in prompt_ms.items()
    ]


def figure(data: RunData) -> Figure:
    """Mean prefill block time over perplexity, with intervals."""
    title = "Latency against quality"
    figures = policy_figures(data)
    points = [_point(one, figures[0].block_ms) for one in figures if one.perplexity is not None]
    if not points:
        sentence = "No text was scored in this run, so there is no quality to hold latency against."
        return Figure("quality", title, sentence, "", None, queries(data))
    return Figure("quality", title, _finding(figures), READING, _spec(points, figures[0].block_ms), queries(data))


def _in_order(times: list[Row]) -> list[int]:
    return list(dict.fromkeys(row["policy"] for row in times))


def _cut(mine: dict[int, float], first: dict[int, float]) -> CutInterval:
    both = [prompt for prompt in first if prompt in mine]
    if not both:
        return CutInterval(np.nan, np.nan, np.nan)
    return paired_cut_interval(np.array([mine[p] for p in both]), np.array([first[p] for p in both]))


def _point(one: PolicyQuality, first_ms: float) -> Row:
    point = {**one.document(), "cut_percent": None if np.isnan(one.cut.cut) else 100 * one.cut.cut}
    if not np.isnan(one.cut.low) and one.cut.low != one.cut.high:
        point |= {"low_ms": first_ms * (1 - one.cut.high), "high_ms": first_ms * (1 - one.cut.low)}
    return point


def _finding(figures: list[PolicyQuality]) -> str:
    first, best = figures[0], min(figures, key=lambda one: one.block_ms)
    if best is first:
        return f"{first.policy}: {first.block_ms:.1f} ms per block at a perplexity of {first.perplexity or np.nan:.2f}."
    sure = "" if np.isnan(best.cut.low) else f" (95 %: {100 * best.cut.low:.0f} to {100 * best.cut.high:.0f} %)"
    worse = ""
    if best.perplexity is not None and first.perplexity is not None:
        worse = f", at a perplexity of {best.perplexity:.2f} against {first.perplexity:.2f}"
    less = f"blocks take {100 * best.cut.cut:.0f} % less than under {first.policy}{sure}{worse}"
    return f"{best.policy} is the fastest: {less}."


def _spec(points: list[Row], first_ms: float) -> Spec:
    policies = [point["policy"] for point in points]
    loose = {"zero": False, "nice": False, "padding": 26}
    x = number("perplexity", "perplexity (lower is better)", loose, tickCount=6, format="~g")
    y = number("block_ms", "prefill block time, mean (ms)", {"zero": False, "padding": 22}, tickCount=6, format="~g")
    who = {"field": "policy", "type": "nominal", "title": None, "scale": policy_colours(policies)}
    legend = {"orient": "right", "rowPadding": 7, "symbolSize": 130}
    tips = [
        hint("policy", "policy"), hint("block_ms", "ms per block", ".2f"), hint("cut_percent", "cut, %", ".1f"),
        hint("perplexity", "perplexity", ".3f"), hint("kept", "pairs kept", ".1%"),
    ]  # fmt: skip
    base = {
        "data": {"values": [{"block_ms": first_ms}]},
        "mark": {"type": "rule", "strokeDash": [5, 4], "color": GREY},
        "encoding": {"y": y},
    }
    spread = {
        "mark": {"type": "rule", "strokeWidth": 1.6, "opacity": 0.75},
        "encoding": {
            "x": x,
            "y": {**y, "field": "low_ms"},
            "y2": {"field": "high_ms"},
            "color": {**who, "legend": legend},
        },
    }
    shape = {**who, "scale": {"domain": policies, "range": [SHAPES[i % len(SHAPES)] for i in range(len(policies))]}}
    mark = {
        "mark": {"type": "point", "filled": True, "size": 150, "opacity": 1, "stroke": "white", "strokeWidth": 0.8},
        "encoding": {
            "x": x, "y": y, "color": {**who, "legend": legend}, "shape": {**shape, "legend": legend}, "tooltip": tips,
        },
    }  # fmt: skip
    return {
        "data": {"values": points},
        "width": 560,
        "height": 340,
        "layer": [base, *known(spread, points, "low_ms"), mark],
    }
