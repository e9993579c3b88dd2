"""Where a round's time goes: mean milliseconds of every phase, at the nodes and at the base station."""

from __future__ import annotations

from typing import Any

from testbed.report.data import Row, RunData
from testbed.report.figure import BLACK, PHASE_COLOURS, Figure, Spec, choice, coloured, facet, hint, known, names
from testbed.report.figure import quantity as number
from testbed.runlog.schema import PHASES, GenerationPhase, RoundPhase

APART = tuple(phase for phase in PHASES if not phase.on_gpu)  # the others lie within these
NODE_PHASES = tuple(phase for phase in APART if phase.where in ("link", "node"))
DOWN = next(phase for phase in NODE_PHASES if phase.name == "down")
STATION_PHASES = tuple(phase for phase in APART if phase.where == "BS" and phase.column and phase.name != "wait")
MODES = {GenerationPhase.PREFILL: "prefill", GenerationPhase.DECODE: "decode"}
NODES_READING = (
    "Mean of every phase over the rounds that a node answered, one bar per node, one plot per policy, in a round's "
    "order; times are divided by the dilation. The black line spans ± clock_bound_ns, the most by which the clocks' "
    "offset may move time from the way down to the way up or back; the bar's whole length does not depend on it."
)
STATION_READING = (
    "Mean of the base station's own phases per round, as this machine took them (real time: the BS is not stretched). "
    "The phase wait is left out, since it is what the nodes' bars show."
)


def at_nodes(data: RunData) -> Figure:
    """Stacked phases per node, small plots per policy."""
    query = nodes_query(data)
    answered = data.rows(query)
    bars = [bar for row in answered for bar in _stacked(data, row)]
    title = "Where the time goes: links and nodes"
    if not bars:
        return Figure("phases-nodes", title, "No node answered a request in this run.", "", None, (query,))
    finding = _finding(data, [row for row in answered if row["policy"] == data.compared[0]])
    return Figure("phases-nodes", title, finding, NODES_READING, _nodes_spec(data, bars), (query,))


def at_station(data: RunData) -> Figure:
    """The base station's own work per round, a bar per policy."""
    query = station_query(data)
    bars = [
        {
            "policy": data.policy(row["policy"]),
            "mode": MODES[row["phase"]],
            "part": phase.name,
            "place": place,
            "ms": ms,
        }
        for row in data.rows(query)
        for place, phase in enumerate(STATION_PHASES)
        if (ms := row[_ms(phase)]) is not None
    ]
    title = "Where the time goes: base station"
    if not bars:
        return Figure("phases-bs", title, "No round was recorded in this run.", "", None, (query,))
    sums = [sum(b["ms"] for b in bars if b["policy"] == p and b["mode"] == bars[0]["mode"]) for p in _policies(bars)]
    mode = "prefill" if bars[0]["mode"] == "prefill" else "decoding"
    finding = f"The base station itself works {min(sums):.2f} to {max(sums):.2f} ms per {mode} round, by policy."
    return Figure("phases-bs", title, finding, STATION_READING, _station_spec(bars), (query,))


def nodes_query(data: RunData) -> str:
    means = ",\n  ".join(f"avg({phase.column} / dilation) / 1e6 as {_ms(phase)}" for phase in NODE_PHASES)
    return (
        f"select policy, phase, device, count(*) as rounds,\n  {means},\n"
        "  avg(clock_bound_ns / dilation) / 1e6 as bound_ms\n"
        f"from rounds where {data.here} and status = 1 and rows > 0\ngroup by all order by all"
    )


def station_query(data: RunData) -> str:
    means = ",\n  ".join(_station_mean(phase) for phase in STATION_PHASES)
    return (
        f"select policy, phase, count(distinct round) as rounds,\n  {means}\n"
        f"from rounds where {data.here}\ngroup by all order by all"
    )


def _station_mean(phase: RoundPhase) -> str:
    if phase.name == "send":  # each node's own; the others are of the round, the same in every device's row
        return f"sum({phase.column}) / 1e6 / count(distinct round) as {_ms(phase)}"
    return f"avg({phase.column}) filter (device = 0) / 1e6 as {_ms(phase)}"


def _ms(phase: RoundPhase) -> str:
    return f"{phase.where.lower()}_{phase.name}_ms"


def _stacked(data: RunData, row: Row) -> list[Row]:
    bars: list[Row] = []
    end = 0.0
    facts = {"policy": data.policy(row["policy"]), "mode": MODES[row["phase"]], "node": data.device(row["device"])}
    for phase in NODE_PHASES:
        ms = row[_ms(phase)]
        if ms is None:
            continue
        bar = {**facts, "part": phase.name, "begin": round(end, 5), "end": round(end + ms, 5), "ms": round(ms, 5)}
        end += ms
        if phase.where == "link" and row["bound_ms"] is not None:
            bar["bound"] = round(row["bound_ms"], 5)
            if phase.name == "down":
                bar |= {"low": round(max(0.0, ms - row["bound_ms"]), 5), "high": round(ms + row["bound_ms"], 5)}
        bars.append({**bar, "rounds": row["rounds"]})
    return bars


def _finding(data: RunData, rows: list[Row]) -> str:
    of_prefill = [row for row in rows if row["phase"] == GenerationPhase.PREFILL] or rows
    whole = {row["device"]: sum(row[_ms(phase)] or 0.0 for phase in NODE_PHASES) for row in of_prefill}
    slowest = max(of_prefill, key=lambda row: whole[row["device"]])
    most = max(NODE_PHASES, key=lambda phase: slowest[_ms(phase)] or 0.0)
    share = (slowest[_ms(most)] or 0.0) / whole[slowest["device"]] if whole[slowest["device"]] else 0.0
    sure = f" (± {slowest['bound_ms']:.2f})" if most.where == "link" and slowest["bound_ms"] is not None else ""
    where = f"{most.where} {most.name}" if most.where == "link" else most.name
    part = "" if slowest[_ms(DOWN)] is not None else " at the node alone, its link's times being unknown"
    return (
        f"Under {data.policy(slowest['policy'])}, {data.device(slowest['device'])} takes longest{part}, "
        f"{whole[slowest['device']]:.1f} ms per {MODES[slowest['phase']]} round; {100 * share:.0f} % of that is "
        f"{where}, {slowest[_ms(most)]:.1f} ms{sure}."
    )


def _policies(bars: list[Row]) -> list[str]:
    return list(dict.fromkeys(bar["policy"] for bar in bars))


def _chosen_mode(bars: list[Row]) -> dict[str, Any]:
    modes = [mode for mode in MODES.values() if mode in {bar["mode"] for bar in bars}]
    menu = {"params": [choice("mode", "Rounds of", modes)]} if len(modes) > 1 else {}
    return {**menu, "transform": [{"filter": "datum.mode === mode"}]} if menu else {}


def _nodes_spec(data: RunData, bars: list[Row]) -> Spec:
    policies = _policies(bars)
    columns = min(len(policies), 4)
    lane = names("node", data.devices)
    parts = {phase.name: PHASE_COLOURS[phase.name] for phase in NODE_PHASES}
    tips = [
        hint("node", "node"), hint("part", "phase"), hint("ms", "mean ms", ".3f"),
        hint("bound", "± ms (clocks)", ".3f"), hint("rounds", "rounds"),
    ]  # fmt: skip
    x = number("begin", "mean ms per round", {"nice": False}, tickCount=4)
    bar = {
        "mark": {"type": "bar", "height": {"band": 0.78}},
        "encoding": {
            "x": x, "x2": {"field": "end"}, "y": lane,
            "color": coloured("part", parts), "tooltip": tips,
        },
    }  # fmt: skip
    bound = {
        "mark": {"type": "rule", "color": BLACK, "strokeWidth": 1.4},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": lane},
    }
    width = max(150, (820 - 22 * (columns - 1)) // columns)
    plot = {"width": width, "height": {"step": 17}, "layer": [bar, *known(bound, bars, "low")]}
    return {
        "data": {"values": bars}, **_chosen_mode(bars), "facet": facet("policy", policies), "columns": columns,
        "spec": plot,
    }  # fmt: skip


def _station_spec(bars: list[Row]) -> Spec:
    parts = {phase.name: PHASE_COLOURS[phase.name] for phase in STATION_PHASES}
    encoding = {
        "x": {**number("ms", "mean time per round (ms, real)", {"nice": False}, tickCount=10), "stack": "zero"},
        "y": names("policy", _policies(bars)),
        "color": coloured("part", parts),
        "order": {"field": "place", "type": "quantitative"},
        "tooltip": [hint("policy", "policy"), hint("part", "phase"), hint("ms", "mean ms", ".3f")],
    }
    mark = {"type": "bar", "height": {"band": 0.72}}
    return {
        "data": {"values": bars},
        **_chosen_mode(bars),
        "width": 700,
        "height": {"step": 24},
        "mark": mark,
        "encoding": encoding,
    }
