"""The words of a run's log: its files and tables, the phases of a round, what became of it, where values come from."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

SCHEMA_VERSION = 2
MANIFEST, CONFIG, EVENTS = "manifest.json", "config.toml", "events.jsonl"
SEGMENT, PARQUET, DAMAGED = ".seg", ".parquet", ".damaged"
TABLES = ("rounds", "tokens")  # what the BS records
NODES = "nodes"  # what each node recorded itself: a table once collected, and the folder of their files before

KINDS = {
    "measured": "read from a clock, counted, or copied from what the model, the node or the policy gave",
    "inferred": "estimated from measured values",
    "configured": "follows from the run file and the manifest",
    "emulated": "added on purpose, so that this machine behaves like another one",
}


class GenerationPhase(IntEnum):
    PREFILL = 0
    DECODE = 1


class Status(IntEnum):
    """What became of a device in a round."""

    IDLE = 0
    ANSWERED = 1
    LATE = 2
    LOST = 3
    REJECTED = 4
    INVALID = 5


STATUS_MEANING = {
    Status.IDLE: "nothing was sent to it",
    Status.ANSWERED: "its whole reply came in time",
    Status.LATE: "alive, but past the deadline",
    Status.LOST: "its connection went away",
    Status.REJECTED: "the node refused the request",
    Status.INVALID: "its reply was broken",
}


class Reply(IntEnum):
    """How far a node came with a block. A later step has the greater number."""

    COMPUTED = 0
    SENT = 1
    REFUSED = 2


REPLY_MEANING = {
    Reply.COMPUTED: "the block was computed; its reply was not, or not yet, handed to the socket whole",
    Reply.SENT: "the whole reply was handed to the socket, which does not say that it arrived",
    Reply.REFUSED: "the node told the BS that it would not compute the block",
}


class RoundPhase(NamedTuple):
    where: str
    name: str
    column: str | None
    note: str = ""
    on_gpu: bool = False  # told only where a GPU computes; its time lies within that of others


PHASES = (
    RoundPhase("BS", "gate", None, "inside the model, not separated yet"),
    RoundPhase("BS", "select", "select_ns"),
    RoundPhase("BS", "group", "group_ns"),
    RoundPhase("BS", "quantise", "quantise_ns"),
    RoundPhase(
        "BS",
        "staging",
        "staging_ns",
        "on a GPU: the rows' copy, part of quantise, and the result's, after the round",
        True,
    ),
    RoundPhase("BS", "send", "send_ns"),
    RoundPhase(
        "link", "down", "down_ns", "one way: needs the offset between two clocks, wrong by clock_bound_ns at most"
    ),
    RoundPhase("node", "queue", "node_queue_ns"),
    RoundPhase("node", "dequantise", "node_dequantise_ns"),
    RoundPhase("node", "staging", "node_staging_ns", "on a GPU: copies to and from it, part of compute", True),
    RoundPhase("node", "compute", "node_compute_ns"),
    RoundPhase("node", "quantise", "node_quantise_ns"),
    RoundPhase("link", "up", "up_ns", "likewise"),
    RoundPhase("BS", "wait", "wait_ns"),
    RoundPhase("BS", "dequantise", "dequantise_ns"),
    RoundPhase("BS", "combine", "combine_ns"),
    RoundPhase("BS", "record", "record_ns_previous", "known only after the row is written, so the next round tells it"),
)
