"""Which experts the gate chose, which of its choices were computed, and which node did the work."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

from testbed.report.data import Row, RunData
from testbed.report.figure import BLUE, ORANGE, Figure, Spec, hint, names

NUMBERS_UP_TO = 160  # cells of one plot that still have room for a number
CELLS_AT_MOST = 4000
BLUES, ORANGES = ["#f4f8fc", BLUE], ["#fdf6e7", ORANGE]
EXPERTS_READING = (
    "Rows are MoE layers, columns experts, prefill and decoding together. Left: how often the gate chose an expert, as "
    "a multiple of an even load (1.0). Right: the share of its choices that the expert itself computed, under the "
    "fastest policy; what is missing was dropped, lost or asked of another expert."
)
NODES_READING = (
    "Share of all rows (pairs of token and expert) that each node was sent, one line per policy, of all rounds. "
    "Lines add up to 100 %."
)


def per_layer(data: RunData) -> Figure:
    """Load of every expert of every layer."""
    query = experts_query(data)
    title = "Expert load per layer"
    cells = [dict(row) for row in data.rows(query)]
    chosen = [cell for cell in cells if cell["policy"] == data.compared[0]]
    if not chosen:
        return Figure("experts", title, "No token was routed in this run.", "", None, (query,))
    layers = len({cell["layer"] for cell in chosen})
    for cell in chosen:
        of_layer = [other["pairs"] for other in chosen if other["layer"] == cell["layer"]]
        cell["times_even"] = round(cell["pairs"] * cell["experts"] / sum(of_layer), 4)
    most = max(chosen, key=lambda cell: cell["times_even"])
    finding = (
        f"The busiest is expert {most['expert']} of layer {most['layer']}: the gate chose it {most['times_even']:.1f} "
        f"times as often as an even load would have."
    )
    if layers * most["experts"] > CELLS_AT_MOST:
        return Figure(
            "experts",
            title,
            f"{finding} Its {layers * most['experts']} cells are too many to draw.",
            "",
            None,
            (query,),
        )
    computed = [cell for cell in cells if cell["policy"] == data.compared[-1]]
    return Figure("experts", title, finding, EXPERTS_READING, _experts_spec(data, chosen, computed), (query,))


def per_node(data: RunData) -> Figure:
    """Share of the rows that went to each node, by policy."""
    query = (
        "select policy, device, sum(rows) as rows, sum(rows) / sum(sum(rows)) over (partition by policy) as share\n"
        f"from rounds where {data.here}\ngroup by policy, device order by policy, device"
    )
    title = "Load per node"
    cells = [
        {
            "policy": data.policy(row["policy"]),
            "node": data.device(row["device"]),
            "rows": int(row["rows"]),
            "share": row["share"],
        }
        for row in data.rows(query)
        if row["share"] is not None
    ]
    if not cells:
        return Figure("load", title, "No row was sent in this run.", "", None, (query,))
    most = max(cells, key=lambda cell: cell["share"])
    finding = f"The largest share is {most['node']}'s under {most['policy']}: {100 * most['share']:.0f} % of all rows."
    return Figure("load", title, finding, NODES_READING, _nodes_spec(data, cells), (query,))


def experts_query(data: RunData) -> str:
    return (
        f"with pairs as (\n  select policy, layer, unnest(expert) as expert, unnest(kept) as kept,\n"
        "    unnest(coalesce(asked, expert)) as asked\n"
        f"  from tokens where {data.here} and policy in ({', '.join(map(str, data.compared))})\n)\n"
        "select policy, layer, expert, count(*) as pairs,\n"
        "  avg(case when kept and asked = expert then 1.0 else 0.0 end) as computed,\n"
        "  max(max(expert)) over () + 1 as experts\n"
        "from pairs group by policy, layer, expert order by all"
    )


def _experts_spec(data: RunData, chosen: list[Row], computed: list[Row]) -> Spec:
    left = {"range": BLUES, "domainMin": 0}
    right = {"range": ORANGES, "domain": [0, 1]}
    of_first = f"chosen by the gate under {data.policy(data.compared[0])} (1.0: even load)"
    of_last = f"computed by that expert under {data.policy(data.compared[-1])}"
    plots = [
        _heat(chosen, "times_even", of_first, left, ".2f", 0.66 * max(cell["times_even"] for cell in chosen)),
        _heat(computed, "computed", of_last, right, ".0%", 1.0),
    ]
    return {"hconcat": plots, "resolve": {"scale": {"color": "independent"}}}


def _heat(values: list[Row], field: str, title: str, scale: Spec, form: str, dark_from: float) -> Spec:
    few = len(values) <= NUMBERS_UP_TO
    layers = {value["layer"] for value in values}
    x = names("expert", [], "expert", axis={"labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False})
    y = names("layer", [], "layer", axis={"labelOverlap": True, "domain": False, "ticks": False})
    place = {"x": {**x, "sort": "ascending"}, "y": {**y, "sort": "ascending"}}
    tips = [
        hint("layer", "layer"), hint("expert", "expert"), hint("pairs", "pairs chosen", "d"), hint(field, title, form),
    ]  # fmt: skip
    colour = {"field": field, "type": "quantitative", "scale": scale, "legend": None}
    rect = {
        "mark": {"type": "rect", "stroke": "white", "strokeWidth": 1 if few else 0},
        "encoding": {**place, "color": colour, "tooltip": tips},
    }
    shown = {
        "mark": {"type": "text", "fontSize": 11},
        "encoding": {
            **place, "text": {"field": field, "type": "quantitative", "format": form},
            "color": {"value": "#1f2328", "condition": {"test": f"datum.{field} > {dark_from}", "value": "white"}},
        },
    }  # fmt: skip
    return {
        "data": {"values": values}, "title": title, "width": 395,
        "height": max(110, min(480, 30 * len(layers))),
        "layer": [rect, *([shown] if few else [])],
    }  # fmt: skip


def _nodes_spec(data: RunData, cells: list[Row]) -> Spec:
    policies = list(dict.fromkeys(cell["policy"] for cell in cells))
    bare = {"domain": False, "ticks": False, "labelAngle": 0}
    place = {
        "x": names("node", data.devices, None, axis={**bare, "orient": "top"}),
        "y": names("policy", policies, None, axis=bare),
    }
    scale = {"range": BLUES, "domainMin": 0}
    rect = {
        "mark": {"type": "rect", "stroke": "white"},
        "encoding": {
            **place, "color": {"field": "share", "type": "quantitative", "scale": scale, "legend": None},
            "tooltip": [
                hint("policy", "policy"), hint("node", "node"), hint("rows", "rows", ",d"),
                hint("share", "share", ".2%"),
            ],
        },
    }  # fmt: skip
    high = 0.66 * max(cell["share"] for cell in cells)
    shown = {
        "mark": {"type": "text", "fontSize": 11.5},
        "encoding": {
            **place, "text": {"field": "share", "type": "quantitative", "format": ".1%"},
            "color": {"value": "#1f2328", "condition": {"test": f"datum.share > {high}", "value": "white"}},
        },
    }  # fmt: skip
    few = len(cells) <= NUMBERS_UP_TO
    return {"data": {"values": cells}, "width": 780, "height": {"step": 27}, "layer": [rect, *([shown] if few else [])]}
