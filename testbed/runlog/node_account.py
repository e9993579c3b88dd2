"""What became of the blocks that nodes served, by their own rows beside the base station's: in SQL, as anyone may ask.

Times are emulated where the run's are: without dilation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.runlog.catalog import describe_run
from testbed.runlog.query import LogDatabase

# A reply that was not used has no receipt that would tell the clocks' offset: the last one that was used does, its
# bound grown by what two clocks may drift apart since. What the uplink would have taken is the prediction of then.
ACCOUNT = """
WITH asked AS (SELECT round, device, attempt, status, dilation, bs_sent_ns FROM rounds WHERE rows > 0),
both_sides AS (
    SELECT *, nodes.round IS NOT NULL AS at_node, asked.round IS NOT NULL AS at_bs, round >= 2 ** 61 AS is_probe
    FROM nodes FULL JOIN asked USING (round, device, attempt)
),
clock AS (
    SELECT device, node_boot, round, clock_offset_s * 1e9 AS offset_ns, clock_bound_ns, bs_sent_ns AS at_ns,
        predicted_up_s * 1e3 AS up_ms
    FROM rounds WHERE status = 1 AND clock_offset_s IS NOT NULL
),
unused AS (
    SELECT b.device, (node_sent_ns - node_received_ns) / dilation / 1e6 AS in_node_ms,
        (node_sent_ns - bs_sent_ns - offset_ns) / dilation / 1e6 AS ready_ms,
        (clock_bound_ns + 2e-4 * (bs_sent_ns - at_ns)) / dilation / 1e6 AS bound_ms, up_ms
    FROM both_sides b ASOF LEFT JOIN clock c
        ON b.device = c.device AND b.node_boot = c.node_boot AND b.round >= c.round
    WHERE at_node AND at_bs AND status <> 1 AND reply <> 2
),
times AS (
    SELECT device, median(in_node_ms) AS in_node_ms_p50, max(in_node_ms) AS in_node_ms_max,
        median(ready_ms) AS ready_ms_p50, max(ready_ms) AS ready_ms_max, max(bound_ms) AS bound_ms,
        median(ready_ms + up_ms) AS would_have_taken_ms_p50, max(ready_ms + up_ms) AS would_have_taken_ms_max
    FROM unused GROUP BY device
),
counts AS (
    SELECT device,
        count(*) FILTER (at_node AND reply <> 2 AND NOT is_probe) AS served,
        count(*) FILTER (at_node AND at_bs AND reply <> 2 AND status = 1) AS used,
        count(*) FILTER (at_node AND at_bs AND reply <> 2 AND status = 2) AS late,
        count(*) FILTER (at_node AND at_bs AND reply <> 2 AND status = 3) AS lost,
        count(*) FILTER (at_node AND at_bs AND reply <> 2 AND status > 3) AS invalid,
        count(*) FILTER (reply = 0) AS unsent,
        count(*) FILTER (reply = 2) AS refused,
        count(*) FILTER (NOT at_bs AND NOT is_probe) AS only_node,
        count(*) FILTER (NOT at_node) AS only_bs,
        count(*) FILTER (is_probe) AS probes
    FROM both_sides GROUP BY device
)
SELECT * FROM counts LEFT JOIN times USING (device) ORDER BY device
"""


@dataclass(frozen=True, slots=True)
class NodeAccount:
    """One node. Counts of blocks, and milliseconds of those that it served and that were not used; None if unknown."""

    node: str
    served: int  # computed by the node, by its own rows
    used: int  # ... of these: the base station has the reply
    late: int  # ... past the deadline
    lost: int  # ... the connection went away
    invalid: int  # ... of which the base station made nothing
    unsent: int  # ... the reply was not handed to the node's socket whole
    refused: int  # the node did not compute them
    only_node: int  # of which the base station's log has no row: it was killed, or its disk was full
    only_bs: int  # of which the node has no row: it never got them whole, or its rows are not here
    probes: int  # of which the base station keeps no row
    in_node_ms_p50: float | None  # from the request read until the reply was handed to the socket
    in_node_ms_max: float | None
    ready_ms_p50: float | None  # from the request's first byte at the base station until then
    ready_ms_max: float | None
    bound_ms: float | None  # the most by which these two can be wrong: they are differences of two clocks
    would_have_taken_ms_p50: float | None  # ... and the uplink as it was predicted
    would_have_taken_ms_max: float | None

    def document(self) -> dict[str, Any]:
        return asdict(self)


def node_accounts(run_dir: Path) -> list[NodeAccount]:
    """One per node that was sent anything, in the order of devices. Raises RunLogError where a log is damaged."""
    run = describe_run(run_dir)
    with LogDatabase([run]) as database:
        answer = database.ask(ACCOUNT)
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    return [NodeAccount(run.devices[row.pop("device")], **row) for row in rows]
