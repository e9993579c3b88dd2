"""A few rounds, device by device: when its rows were on the way down, waited, were computed, and came back."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import median

from testbed.report.data import Row, RunData
from testbed.report.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    RED,
    SKY,
    Figure,
    Spec,
    coloured,
    hint,
    known,
    names,
)
from testbed.report.figure import quantity as number
from testbed.runlog.schema import Status

BARS_AT_MOST = 1500
STATION = "BS"
UNDIVIDED = "out and back, one-way times unknown"
COLOURS = {
    "BS at work": BLUE, "down": SKY, "node: queue, codec": PALE, "compute": ORANGE, "up": GREEN,
    UNDIVIDED: GREY, "no reply in time": RED,
}  # fmt: skip
READING = (
    "Each bar is a phase of one round at one node, both panels the same prompt on the same axis. Where a round's last "
    "bar ends, everyone has waited for that node: a black tick marks it. Times are divided by the round's dilation. "
    "A bar's outer ends are stamps of the BS's own clock; between them a thin line spans how far the clocks' offset "
    "may have shifted the end of a way down (± clock_bound_ns). The BS's bars are durations set before the first "
    "request and after the last reply."
)


def figure(data: RunData) -> Figure:
    """Rounds of one prompt under the run's first and its fastest policy."""
    prompt, phase = _window(data)
    query = _query(data, prompt, phase)
    rows = data.rows(query)
    title = "Timeline of rounds"
    if not rows:
        return Figure("timeline", title, "No request was sent in this run.", "", None, (query,))
    rounds_shown = max(1, BARS_AT_MOST // (6 * len(data.devices) * len(data.compared)))
    rows = [row for row in rows if row["place"] <= rounds_shown]
    bars = [
        bar for policy in data.compared for bar in _bars_of_policy(data, [r for r in rows if r["policy"] == policy])
    ]
    spec = _spec(data, bars, [data.policy(index) for index in data.compared])
    return Figure("timeline", title, _finding(rows, bars, prompt), READING, spec, (query,))


def _window(data: RunData) -> tuple[int, int]:
    """The prompt in the middle, and the phase, of the first policy's prefill, or its decoding where there is none."""
    found = data.rows(
        f"select phase, prompt from rounds where {data.here} and policy = {data.compared[0]} and rows > 0\n"
        "group by all order by all"
    )
    prompts = [row["prompt"] for row in found if row["phase"] == found[0]["phase"]] or [0]
    return prompts[len(prompts) // 2], found[0]["phase"] if found else 0


def _query(data: RunData, prompt: int, phase: int) -> str:
    return (
        "select policy, round, layer, device, status, rows, dilation, round_ns,\n"
        "  select_ns + group_ns + quantise_ns as before_ns, bs_sent_ns, bs_received_ns, down_ns, up_ns,\n"
        "  clock_bound_ns, node_received_ns, node_sent_ns, node_compute_ns,\n"
        "  coalesce(node_queue_ns, 0) + coalesce(node_dequantise_ns, 0) as node_before_ns,\n"
        "  dense_rank() over (partition by policy order by round) as place\n"
        f"from rounds where {data.here} and prompt = {prompt} and phase = {phase} and rows > 0\n"
        f"  and policy in ({', '.join(map(str, data.compared))}) and bs_sent_ns is not null\n"
        "order by policy, round, device"
    )


def _bars_of_policy(data: RunData, rows: list[Row]) -> Iterator[Row]:
    """Milliseconds since the policy's first round in the window began."""
    start_ns = min((row["bs_sent_ns"] - (row["before_ns"] or 0) for row in rows), default=0)
    for _, group in groupby(rows, key=lambda row: row["round"]):
        of_round = list(group)
        replied = [row for row in of_round if row["bs_received_ns"] is not None]
        last = max(replied, key=lambda row: row["bs_received_ns"], default=None)
        facts = {"policy": data.policy(of_round[0]["policy"]), "round": of_round[0]["round"]}
        for bar in _station_bars(of_round, last):
            yield _in_ms({**facts, **bar, "node": STATION}, start_ns, of_round[0])
        for row in of_round:
            for bar in _node_bars(row):
                is_last = {"last": True} if row is last and bar["to"] == row["bs_received_ns"] else {}
                own = {"node": data.device(row["device"]), "rows": row["rows"], "layer": row["layer"], **is_last}
                yield _in_ms({**facts, **bar, **own}, start_ns, row)


def _station_bars(rows: list[Row], last: Row | None) -> Iterator[Row]:
    first_ns, before_ns = min(row["bs_sent_ns"] for row in rows), rows[0]["before_ns"] or 0
    yield {"part": "BS at work", "from": first_ns - before_ns, "to": first_ns, "layer": rows[0]["layer"]}
    end_ns = first_ns - before_ns + rows[0]["round_ns"]
    if last is not None and end_ns > last["bs_received_ns"]:
        yield {"part": "BS at work", "from": last["bs_received_ns"], "to": end_ns, "layer": rows[0]["layer"]}


def _node_bars(row: Row) -> Iterator[Row]:
    sent_ns, received_ns = row["bs_sent_ns"], row["bs_received_ns"]
    if received_ns is None or row["status"] != Status.ANSWERED:
        end_ns = received_ns if received_ns is not None else sent_ns + row["round_ns"]
        yield {"part": "no reply in time", "from": sent_ns, "to": end_ns}
        return
    if None in (row["down_ns"], row["up_ns"], row["clock_bound_ns"]):
        yield {"part": UNDIVIDED, "from": sent_ns, "to": received_ns}
        return
    there_ns, back_ns = sent_ns + row["down_ns"], received_ns - row["up_ns"]
    compute_ns = min(there_ns + row["node_before_ns"], back_ns)
    computed_ns = min(compute_ns + (row["node_compute_ns"] or 0), back_ns)
    yield {"part": "down", "from": sent_ns, "to": there_ns, "bound": row["clock_bound_ns"]}
    yield {"part": "node: queue, codec", "from": there_ns, "to": compute_ns}
    yield {"part": "compute", "from": compute_ns, "to": computed_ns}
    yield {"part": "node: queue, codec", "from": computed_ns, "to": back_ns}
    yield {"part": "up", "from": back_ns, "to": received_ns, "bound": row["clock_bound_ns"]}


def _in_ms(bar: Row, start_ns: int, row: Row) -> Row:
    unit = 1e6 * row["dilation"]
    begin, end, bound = bar.pop("from"), bar.pop("to"), bar.pop("bound", None)
    known = {} if bound is None else {"bound_ms": round(bound / unit, 4)}
    begin_ms, end_ms = (begin - start_ns) / unit, (end - start_ns) / unit
    if known and bar["part"] == "down":
        known |= {"low_ms": round(end_ms - bound / unit, 4), "high_ms": round(end_ms + bound / unit, 4)}
    return {
        **bar,
        **known,
        "begin_ms": round(begin_ms, 4),
        "end_ms": round(end_ms, 4),
        "ms": round(end_ms - begin_ms, 4),
    }


def _finding(rows: list[Row], bars: list[Row], prompt: int) -> str:
    span = {
        p: max(bar["end_ms"] for bar in bars if bar["policy"] == p) for p in dict.fromkeys(b["policy"] for b in bars)
    }
    took = ", ".join(f"{ms:.1f} ms under {policy}" for policy, ms in span.items())
    bounds = [row["clock_bound_ns"] / 1e6 / row["dilation"] for row in rows if row["clock_bound_ns"] is not None]
    sure = f" One-way times are right to ± {median(bounds):.2f} ms in the median." if bounds else ""
    count = max(row["place"] for row in rows)
    return f"Prompt {prompt}: its first {count} rounds (one per MoE layer) took {took}.{sure}"


def _spec(data: RunData, bars: list[Row], policies: list[str]) -> Spec:
    span = number("begin_ms", "time since the prompt's first round began (ms)", {"nice": False}, tickCount=12)
    lane = names("node", [STATION, *data.devices])
    tips = [
        hint("node", "node"), hint("part", "phase"), hint("ms", "ms", ".3f"), hint("bound_ms", "± ms (clocks)", ".3f"),
        hint("layer", "layer"), hint("round", "round"), hint("rows", "rows"),
    ]  # fmt: skip
    bar = {
        "mark": {"type": "bar", "height": {"band": 0.74}},
        "encoding": {
            "x": span,
            "x2": {"field": "end_ms"},
            "y": lane,
            "color": coloured("part", _used(bars)),
            "tooltip": tips,
        },
    }
    bound = {
        "mark": {"type": "rule", "color": BLACK, "strokeWidth": 1.2},
        "encoding": {"x": {**span, "field": "low_ms"}, "x2": {"field": "high_ms"}, "y": lane},
    }
    tick = {
        "mark": {"type": "tick", "color": BLACK, "thickness": 2.6, "height": {"band": 0.95}},
        "encoding": {"x": {**span, "field": "end_ms"}, "y": lane},
    }
    panel = {
        "width": 820,
        "height": {"step": 19},
        "layer": [bar, *known(bound, bars, "low_ms"), *known(tick, bars, "last")],
    }
    panels = [
        {**panel, "title": policy, "transform": [{"filter": {"field": "policy", "equal": policy}}]}
        for policy in policies
    ]
    return {"data": {"values": bars}, "vconcat": panels, "resolve": {"scale": {"x": "shared", "color": "shared"}}}


def _used(bars: list[Row]) -> dict[str, str]:
    parts = {bar["part"] for bar in bars}
    return {part: colour for part, colour in COLOURS.items() if part in parts}
