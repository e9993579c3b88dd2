"""What went wrong, and when: replies that did not come in time, and the rare events of the log."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from testbed.report.data import Row, RunData
from testbed.report.figure import BLUE, GREY, ORANGE, PINK, RED, Figure, Spec, coloured, hint, names
from testbed.report.figure import quantity as number
from testbed.runlog.schema import STATUS_MEANING, Status

MARKS_AT_MOST = 2000
ROUTINE = ("channel", "power", "power_rail", "steered", "telemetry")  # as many as there are prompts or samples
COLOURS = {"late": ORANGE, "lost": RED, "rejected": PINK, "invalid": BLUE, "event": GREY}
READING = (
    "One mark per request that was not answered in time (at its sending) and per event of events.jsonl, on the base "
    "station's clock; rows are the events' kinds and, for requests, what became of them."
)


def figure(data: RunData) -> Figure:
    """Losses and events over the run."""
    queries = (counts_query(data), lost_query(data), events_query(data))
    counts, lost, events = (data.rows(query) for query in queries)
    title = "Losses and events"
    marks = [_loss(data, row) for row in lost] + [_event(row) for row in events]
    if not marks:
        return Figure("events", title, _finding(data, counts), "", None, queries)
    return Figure("events", title, _finding(data, counts), READING, _spec(marks), queries)


def counts_query(data: RunData) -> str:
    return (
        "select device, status, count(*) as requests\n"
        f"from rounds where {data.here} and rows > 0 group by all order by all"
    )


def lost_query(data: RunData) -> str:
    """A sample, evenly over the run, where there are more than a figure can show."""
    return (
        "with lost as (\n  select round, policy, prompt, layer, device, status, rows, bs_sent_ns,\n"
        "    row_number() over (order by round, device) as place, count(*) over () as lost\n"
        f"  from rounds where {data.here} and status > 1\n)\n"
        f"select *, (bs_sent_ns - {data.first_sent_ns}) / 1e9 as seconds from lost\n"
        f"where bs_sent_ns is not null and place % greatest(1, lost // {MARKS_AT_MOST}) = 0 order by place"
    )


def events_query(data: RunData) -> str:
    return (
        f"select kind, device_name, policy, prompt, (monotonic_ns - {data.first_sent_ns}) / 1e9 as seconds, facts\n"
        f"from events where {data.here} and kind not in ({', '.join(repr(kind) for kind in ROUTINE)})\n"
        f"order by monotonic_ns limit {MARKS_AT_MOST}"
    )


def _loss(data: RunData, row: Row) -> Row:
    status = Status(row["status"]).name.lower()
    what = f"{row['rows']} rows of round {row['round']}, layer {row['layer']}: {STATUS_MEANING[Status(row['status'])]}"
    where = {"lane": f"request {status}", "kind": status, "node": data.device(row["device"])}
    return {**where, "seconds": round(row["seconds"], 4), "policy": data.policy(row["policy"]), "what": what}


def _event(row: Row) -> Row:
    facts = row["facts"] if len(row["facts"]) <= 160 else row["facts"][:157] + "..."
    node = {} if row["device_name"] is None else {"node": row["device_name"]}
    lane = row["kind"].replace("_", " ")
    return {"lane": lane, "kind": "event", "seconds": round(row["seconds"], 4), "what": facts, **node}


def _finding(data: RunData, counts: list[Row]) -> str:
    requests = sum(row["requests"] for row in counts)
    missed = [row for row in counts if row["status"] > Status.ANSWERED]
    if not requests:
        return "No request was sent in this run."
    if not missed:
        return f"All {requests:,} requests were answered in time."
    by_status = {status: sum(r["requests"] for r in missed if r["status"] == status) for status in Status}
    told = ", ".join(f"{count:,} {status.name.lower()}" for status, count in by_status.items() if count)
    by_node = {row["device"]: 0 for row in missed}
    for row in missed:
        by_node[row["device"]] += row["requests"]
    worst = max(by_node, key=lambda device: by_node[device])
    return f"Of {requests:,} requests {told}; most of them at {data.device(worst)} ({by_node[worst]:,})."


def _spec(marks: list[Row]) -> Spec:
    lanes = list(dict.fromkeys(mark["lane"] for mark in marks))
    used = {kind: colour for kind, colour in COLOURS.items() if kind in {mark["kind"] for mark in marks}}
    colour = {**coloured("kind", used), **({"legend": None} if len(used) == 1 else {})}
    tips = [
        hint("lane", "what"), hint("node", "node"), hint("policy", "policy"), hint("seconds", "s", ".3f"),
        hint("what", "more"),
    ]  # fmt: skip
    return {
        "data": {"values": marks}, "width": 720, "height": {"step": 24},
        "mark": {"type": "tick", "thickness": 2, "height": {"band": 0.62}, "opacity": 0.85},
        "encoding": {
            "x": number("seconds", "time since the run's first request (s)", {"nice": False, "padding": 10}),
            "y": names("lane", lanes), "color": colour, "tooltip": tips,
        },
    }  # fmt: skip
