"""Every column of a run's log with its unit, where it comes from and what it means, and how a record holds them.

N devices, T tokens of a round, K experts chosen per token, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from testbed.runlog.schema import NODES, Reply, Status

COMMIT = "commit"  # last field of every record, written after all others: its mark (marks.py); 0 is an empty record


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `size` is "K", "E" or "" for a single value. A nullable one may be unknown: null, never 0."""

    name: str
    format: str
    unit: str
    kind: str
    meaning: str
    size: str = ""
    nullable: bool = False

    @property
    def missing(self) -> Any:
        return missing_value(np.dtype(self.format))


def missing_value(dtype: np.dtype[Any]) -> Any:
    """How unknown is written in a segment: NaN, -1, or the largest unsigned value."""
    if dtype.kind == "f":
        return np.nan
    return np.iinfo(dtype).max if dtype.kind == "u" else -1


def _duration(name: str, meaning: str, kind: str = "measured") -> Column:
    return Column(name, "<i8", "ns", kind, meaning, nullable=True)


def _seconds(name: str, meaning: str, kind: str = "inferred") -> Column:
    return Column(name, "<f8", "s", kind, meaning, nullable=True)


def _rate(name: str, meaning: str, kind: str) -> Column:
    return Column(name, "<f4", "bit/s", kind, meaning, nullable=True)


_KEYS = (
    Column("round", "<u8", "", "measured", "number of the expert round in this run"),
    Column("policy", "<u2", "", "configured", "index into the manifest's list of policies"),
    Column("prompt", "<i4", "", "configured", "index of the prompt or text window"),
    Column("layer", "<u2", "", "measured", "MoE block of the model"),
    Column("phase", "u1", "", "measured", "0 prefill, 1 decode"),
)
KEY_NAMES = tuple(key.name for key in _KEYS)

ROUND_COLUMNS = (
    *_KEYS,
    Column("attempt", "<u2", "", "measured", "0 for the first try of the round"),
    Column("device", "<u2", "", "configured", "index into the manifest's list of devices"),
    Column(
        "node_boot", "<u8", "", "measured", "boot id of the node's process; null before it first joined", nullable=True
    ),
    Column(
        "dilation", "<f4", "", "emulated", "emulated time was stretched by this: divide times by it, not the BS's own"
    ),
    Column("tokens", "<u4", "tokens", "measured", "T of the round"),
    Column("rows", "<u4", "rows", "measured", "pairs (token, expert) sent to the device"),
    Column("experts_touched", "<u2", "experts", "measured", "distinct experts among these rows"),
    Column("parts_down", "<u2", "messages", "measured", "parts the request travelled in"),
    Column("parts_up", "<u2", "messages", "measured", "parts of the reply that arrived"),
    Column("bytes_down", "<u8", "bytes", "measured", "sent to the node, headers included, encryption not"),
    Column("bytes_up", "<u8", "bytes", "measured", "received from the node, headers included, encryption not"),
    Column("status", "u1", "", "measured", ", ".join(f"{s.value} {s.name.lower()}" for s in Status)),
    Column("state_available", "?", "", "measured", "what the policy saw: the device could be chosen"),
    _duration("record_ns_previous", "writing the log rows of the round recorded before this one"),
    _duration("select_ns", "the policy's choice; of the round, the same in every device's row"),
    _duration("group_ns", "rows gathered per node; of the round"),
    _duration("quantise_ns", "rows quantised at the BS; of the round"),
    _duration(
        "staging_ns",
        "copies between host and GPU at the BS: the rows', part of quantise_ns, and the result's, after the round; "
        "of the round; null where the model is on no GPU",
    ),
    _duration("wait_ns", "BS waiting for replies; of the round"),
    _duration("dequantise_ns", "replies dequantised at the BS; of the round"),
    _duration("combine_ns", "weighted sum (Eq. 1); of the round"),
    _duration("round_ns", "the whole expert round at the BS, without recording it"),
    _duration("send_ns", "handing this node's parts to the socket"),
    _duration("rtt_ns", "first byte handed to the socket for this node until the last part of its reply was read"),
    _duration("bs_sent_ns", "stamp on the BS's monotonic clock: first part handed to the socket"),
    _duration("bs_received_ns", "stamp on the BS's monotonic clock: last part of the reply read"),
    _duration("node_received_ns", "stamp on the node's monotonic clock: last part of the request read"),
    _duration("node_sent_ns", "stamp on the node's monotonic clock: reply handed to the socket"),
    _duration("node_queue_ns", "request waiting in the node"),
    _duration("node_dequantise_ns", "rows dequantised at the node"),
    _duration("node_compute_ns", "expert FFN, device synchronised, padding included"),
    _duration("node_padding_ns", "time added to the compute to match a slower device", kind="emulated"),
    _duration("node_staging_ns", "copies between host and GPU, part of the compute; null where there is no GPU"),
    _duration("node_quantise_ns", "results quantised at the node"),
    _duration("down_ns", "first part handed to the socket until the last was read at the node", kind="inferred"),
    _duration("up_ns", "reply handed to the socket until its last part was read at the BS", kind="inferred"),
    _duration("clock_bound_ns", "the most by which the offset and the one-way times can be wrong", kind="inferred"),
    _seconds("clock_offset_s", "the node's clock minus the BS's, as far as messages tell"),
    _seconds("predicted_compute_s", "what was expected of the node before the round, in emulated time"),
    _seconds("predicted_down_s", "... of the downlink"),
    _seconds("predicted_up_s", "... of the uplink"),
    _seconds("state_token_s", "what the policy saw: time of one token alone on the device (Eq. 6)"),
    _seconds("state_age_s", "what the policy saw: time since the estimate was last taught", kind="measured"),
    _seconds("state_base_s", "what the policy saw: cost of a round before any row"),
    _seconds("state_expert_s", "what the policy saw: cost of each expert touched"),
    _seconds("state_row_s", "what the policy saw: cost of each row"),
    Column(
        "bandwidth_hz",
        "<f4",
        "Hz",
        "configured",
        "asked for the device; null where no spectrum is shared",
        nullable=True,
    ),
    _rate(
        "asked_down_bits_per_s", "asked for its downlink, by what the BS knows of it; null without a band", "inferred"
    ),
    _rate("asked_up_bits_per_s", "... for its uplink", "inferred"),
    _rate("measured_down_bits_per_s", "bytes_down over down_ns, in emulated time; null without a band", "inferred"),
    _rate("measured_up_bits_per_s", "bytes_up over up_ns, in emulated time; null without a band", "inferred"),
)


def token_columns(score_format: str = "<f2") -> tuple[Column, ...]:
    """Columns of the table `tokens`; the gate's scores are kept in half precision unless told otherwise."""
    return (
        *_KEYS,
        Column("token", "<u4", "", "measured", "index of the token in the round"),
        Column("expert", "<u2", "", "measured", "experts the gate chose", "K"),
        Column("weight", "<f4", "", "measured", "the gate's weights of these experts", "K"),
        Column(
            "asked", "<u2", "", "measured", "experts asked in their places: others only if a policy substitutes", "K"
        ),
        Column("kept", "?", "", "measured", "the pair was computed and its result arrived", "K"),
        Column("device", "<i2", "", "measured", "where the policy sent the pair; -1 where it dropped it", "K"),
        Column("final_weight", "<f4", "", "measured", "weights of the weighted sum; 0 for a pair not kept", "K"),
        Column("score", score_format, "", "measured", "the gate's weight for every expert, if it tells", "E", True),
        Column("orphaned", "?", "", "measured", "no pair was kept: expert output 0"),
    )


_OF_ROUNDS = {column.name: column for column in ROUND_COLUMNS}
_NODE_BLOCK = (
    *(_OF_ROUNDS[name] for name in ("node_received_ns", "node_sent_ns")),
    _duration("node_complete_ns", "stamp on the node's monotonic clock: the whole request dequantised"),
    *(_OF_ROUNDS[f"node_{name}_ns"] for name in ("queue", "dequantise", "compute", "padding", "quantise")),
    Column("payload_bytes_down", "<u8", "bytes", "measured", "of the request, neither headers nor encryption included"),
    Column("payload_bytes_up", "<u8", "bytes", "measured", "of the reply, likewise; 0 where the block was refused"),
    _OF_ROUNDS["rows"],
    Column("width", "<u4", "values", "measured", "values per row, without what pads rows on the wire"),
    _OF_ROUNDS["experts_touched"],
    Column("reply", "u1", "", "measured", ", ".join(f"{r.value} {r.name.lower()}" for r in Reply)),
)

# What a node writes of a block: the run by its number in the manifest, since a node may serve several.
NODE_RECORD = (
    Column("run_number", "<u8", "", "measured", "the run, as the base station drew it"),
    _OF_ROUNDS["round"],
    *_NODE_BLOCK[:-2],
    *(_OF_ROUNDS[name] for name in ("attempt", "layer")),
    *_NODE_BLOCK[-2:],
)

# The same collected: of one run, joined with what its own log says of the round.
NODE_COLUMNS = (
    *(
        replace(key, nullable=True, meaning=f"{key.meaning}; null where the run's log has no such round")
        if key.name in ("policy", "prompt", "phase")
        else key
        for key in _KEYS
    ),
    *(_OF_ROUNDS[name] for name in ("attempt", "device", "node_boot")),
    *_NODE_BLOCK,
)


SPAN = ":"  # "first:last" names the columns from the one to the other, which must have one format


def span(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that a name stands for: itself, or those from first to last. Raises ValueError for one not there."""
    first, _, last = name.partition(SPAN)
    return tuple(columns[columns.index(first) : columns.index(last or first) + 1])


def columns_of(table: str, experts: int, score_format: str = "<f2") -> tuple[Column, ...]:
    """The table's columns; without `score` where the gate gives none (`experts` is 0)."""
    columns = {"rounds": ROUND_COLUMNS, NODES: NODE_COLUMNS}.get(table) or token_columns(score_format)
    return tuple(column for column in columns if column.size != "E" or experts)


def nullable_names() -> set[str]:
    return {column.name for column in (*ROUND_COLUMNS, *token_columns(), *NODE_RECORD) if column.nullable}


def record_dtype(columns: tuple[Column, ...], top_k: int, experts: int) -> np.dtype[Any]:
    """The fixed-width record of these columns, naturally aligned, with the commit mark last."""
    shapes: dict[str, tuple[int, ...]] = {"": (), "K": (top_k,), "E": (experts,)}
    fields = [(column.name, column.format, shapes[column.size]) for column in columns]
    return np.dtype([*fields, (COMMIT, "<u8")], align=True)
