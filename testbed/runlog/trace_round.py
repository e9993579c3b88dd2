"""One round of a run as slices and flows on the base station's clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from testbed.runlog.chrome_trace import ChromeTrace, Track
from testbed.runlog.schema import GenerationPhase, Status

ROUNDS = Track(1, 13)
PADDING = "padding (emulated)"
UNPLACED_NODE_TIMES = ("node_queue_ns", "node_dequantise_ns", "node_compute_ns", "node_padding_ns", "node_quantise_ns")


class Row(NamedTuple):
    """What a trace needs of a row of the table `rounds`. None is unknown, or not a column of that run's schema yet."""

    round: int
    policy: int
    prompt: int
    layer: int
    phase: int
    device: int
    dilation: float
    tokens: int
    rows: int
    experts_touched: int
    bytes_down: int
    bytes_up: int
    parts_down: int
    parts_up: int
    status: int
    select_ns: int | None
    group_ns: int | None
    quantise_ns: int | None
    send_ns: int | None
    wait_ns: int | None
    dequantise_ns: int | None
    combine_ns: int | None
    record_ns_previous: int | None
    round_ns: int | None
    bs_sent_ns: int | None
    node_received_ns: int | None
    node_sent_ns: int | None
    bs_received_ns: int | None
    node_queue_ns: int | None
    node_dequantise_ns: int | None
    node_compute_ns: int | None
    node_padding_ns: int | None
    node_quantise_ns: int | None
    clock_offset_s: float | None
    clock_bound_ns: int | None
    predicted_compute_s: float | None
    predicted_down_s: float | None
    predicted_up_s: float | None
    measured_down_bits_per_s: float | None
    measured_up_bits_per_s: float | None


class DeviceTracks(NamedTuple):
    """A device's tracks, in the order in which a block passes them."""

    downlink: Track
    node: Track
    uplink: Track

    @classmethod
    def of(cls, device: int) -> DeviceTracks:
        pid = 2 + device
        return cls(*(Track(pid, 10 * pid + place) for place in (1, 2, 3)))


class Way(NamedTuple):
    """A block's way there and back, on the base station's clock."""

    bs_sent_ns: int
    received_ns: int
    sent_ns: int
    bs_received_ns: int


class Piece(NamedTuple):
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any]


@dataclass(slots=True)
class Span:
    """A round's rows and its place. It began at most `earlier_ns` before `start_ns`; None: not known."""

    rows: Sequence[Row]
    start_ns: int
    earlier_ns: int | None

    @property
    def first(self) -> Row:
        """What is of the round stands in every device's row."""
        return self.rows[0]

    @property
    def end_ns(self) -> int:
        return self.start_ns + (self.first.round_ns or 0)


@dataclass(slots=True)
class Written:
    """What of a log went into a trace."""

    rounds: int = 0
    rounds_without_stamps: int = 0  # nothing was sent: they have no place in time
    blocks: int = 0  # drawn all the way there and back
    blocks_without_offset: int = 0  # drawn as one round trip: what the node's clock says could not be placed
    losses: int = 0


def write_round(trace: ChromeTrace, span: Span, policy: str, written: Written) -> None:
    """The round and its phases at the base station, and every device's block on its tracks."""
    first, generation = span.first, GenerationPhase(span.first.phase).name.lower()
    trace.slice(ROUNDS, f"{generation}, layer {first.layer}", span.start_ns, span.end_ns, "round", {
        "round": first.round, "policy": policy, "prompt": first.prompt, "layer": first.layer, "phase": generation,
        "tokens": first.tokens, "dilation": first.dilation, "record_ns_previous": first.record_ns_previous,
        "began_earlier_by_at_most_ns": span.earlier_ns,
    })  # fmt: skip
    combine_ns = span.end_ns
    for piece in station_pieces(span):
        trace.slice(ROUNDS, piece.name, piece.start_ns, piece.end_ns, "base station", piece.args)
        combine_ns = piece.start_ns  # the last one
    written.rounds += 1
    for row in span.rows:
        _write_device(trace, row, span.end_ns, combine_ns, written)


def _write_device(trace: ChromeTrace, row: Row, end_ns: int, combine_ns: int, written: Written) -> None:
    tracks = DeviceTracks.of(row.device)
    if row.status > Status.ANSWERED:
        trace.instant(tracks.node, _status(row), end_ns, "loss", _block_args(row))
        written.losses += 1
    if row.bs_sent_ns is None or row.bs_received_ns is None:
        return
    way = _way(row, row.bs_sent_ns, row.bs_received_ns)
    if way is None:
        args = _block_args(row) | {name: getattr(row, name) for name in UNPLACED_NODE_TIMES}
        trace.slice(tracks.node, "there and back", row.bs_sent_ns, row.bs_received_ns, "clock offset unknown", args)
        written.blocks_without_offset += 1
        return
    _write_links(trace, row, way, tracks)
    trace.slice(tracks.node, "block", way.received_ns, way.sent_ns, "node", _block_args(row) | _bound(row))
    stops = (ROUNDS, way.bs_sent_ns), (tracks.node, way.received_ns), (ROUNDS, max(way.bs_received_ns, combine_ns))
    trace.flow("block", (row.round << 16) + row.device, *stops)
    for piece in node_pieces(row, way):
        category = "emulated" if piece.name == PADDING else "node"
        trace.slice(tracks.node, piece.name, piece.start_ns, piece.end_ns, category, piece.args | _bound(row))
    written.blocks += 1


def station_pieces(span: Span) -> Iterator[Piece]:
    """The base station's phases, one after another and inside the round, however odd a log's figures are.

    Sending, waiting, dequantising and combining alternate; each is drawn once with its sum, the last two at the end.
    """
    first, at_ns, end_ns = span.first, span.start_ns, span.end_ns
    for name, length_ns in (("select", first.select_ns), ("group", first.group_ns), ("quantise", first.quantise_ns)):
        if length_ns is not None:
            yield Piece(name, at_ns, min(at_ns + length_ns, end_ns), {})
            at_ns = min(at_ns + length_ns, end_ns)
    combine_ns = max(at_ns, end_ns - (first.combine_ns or 0))
    dequantise_ns = max(at_ns, combine_ns - (first.dequantise_ns or 0))
    until_ns = max(at_ns, dequantise_ns - (first.wait_ns or 0))
    sent = sorted(((row.bs_sent_ns, row) for row in span.rows if row.bs_sent_ns is not None), key=itemgetter(0))
    next_ones_ns = [*(sent_ns for sent_ns, _ in sent[1:]), until_ns]
    for (sent_ns, row), next_ns in zip(sent, next_ones_ns, strict=False):
        start_ns = min(max(at_ns, sent_ns), end_ns)
        at_ns = max(start_ns, min(start_ns + (row.send_ns or 0), next_ns, end_ns))
        yield Piece("send", start_ns, at_ns, _block_args(row) | {"device": row.device, "send_ns": row.send_ns})
    if first.wait_ns is not None:
        yield Piece("wait", at_ns, max(at_ns, min(at_ns + first.wait_ns, dequantise_ns)), {"wait_ns": first.wait_ns})
    dequantise_ns, combine_ns = max(at_ns, dequantise_ns), max(at_ns, combine_ns)
    if first.dequantise_ns is not None:
        yield Piece("dequantise", dequantise_ns, combine_ns, {"dequantise_ns": first.dequantise_ns})
    yield Piece("combine", combine_ns, end_ns, {"combine_ns": first.combine_ns})


def _write_links(trace: ChromeTrace, row: Row, way: Way, tracks: DeviceTracks) -> None:
    trace.slice(tracks.downlink, "down", way.bs_sent_ns, way.received_ns, "link", {
        "round": row.round, "bytes": row.bytes_down, "parts": row.parts_down, "predicted_s": row.predicted_down_s,
        "bits_per_s": row.measured_down_bits_per_s, **_bound(row),
    })  # fmt: skip
    trace.slice(tracks.uplink, "up", way.sent_ns, way.bs_received_ns, "link", {
        "round": row.round, "bytes": row.bytes_up, "parts": row.parts_up, "predicted_s": row.predicted_up_s,
        "bits_per_s": row.measured_up_bits_per_s, **_bound(row),
    })  # fmt: skip
    if row.clock_bound_ns is not None:
        trace.counter(tracks.node.pid, "clock bound", way.bs_received_ns, "ns", row.clock_bound_ns)


def node_pieces(row: Row, way: Way) -> Iterator[Piece]:
    """The node's phases as its loop has them: from the reply backwards, since rows of earlier parts are dequantised
    while the last one travels."""
    first_ns, last_ns = way.received_ns, way.sent_ns
    quantise_ns = max(first_ns, last_ns - (row.node_quantise_ns or 0))
    compute_ns = max(first_ns, quantise_ns - (row.node_compute_ns or 0))
    queue_ns = max(first_ns, compute_ns - (row.node_queue_ns or 0))
    if row.node_dequantise_ns is not None:
        end_ns = min(first_ns + row.node_dequantise_ns, queue_ns)
        yield Piece("dequantise", first_ns, end_ns, {"node_dequantise_ns": row.node_dequantise_ns})
    if row.node_queue_ns is not None:
        yield Piece("queue", queue_ns, compute_ns, {})
    if row.node_compute_ns is not None:
        yield Piece("compute", compute_ns, quantise_ns, {
            "rows": row.rows, "experts": row.experts_touched, "predicted_s": row.predicted_compute_s,
            "padding_ns": row.node_padding_ns,
        })  # fmt: skip
    if row.node_padding_ns:
        padding_ns = max(compute_ns, quantise_ns - row.node_padding_ns)
        yield Piece(PADDING, padding_ns, quantise_ns, {"padding_ns": row.node_padding_ns})
    if row.node_quantise_ns is not None:
        yield Piece("quantise", quantise_ns, last_ns, {})


def _way(row: Row, bs_sent_ns: int, bs_received_ns: int) -> Way | None:
    """None without an offset. The node had the block within the round trip, wherever the offset's error puts it."""
    if row.clock_offset_s is None or row.node_received_ns is None or row.node_sent_ns is None:
        return None
    offset_ns = round(row.clock_offset_s * 1e9)
    received_ns = min(max(row.node_received_ns - offset_ns, bs_sent_ns), bs_received_ns)
    sent_ns = min(max(row.node_sent_ns - offset_ns, received_ns), bs_received_ns)
    return Way(bs_sent_ns, received_ns, sent_ns, bs_received_ns)


def _bound(row: Row) -> dict[str, Any]:
    return {"clock_bound_ns": row.clock_bound_ns}


def _block_args(row: Row) -> dict[str, Any]:
    return {
        "round": row.round,
        "rows": row.rows,
        "experts": row.experts_touched,
        "bytes_down": row.bytes_down,
        "bytes_up": row.bytes_up,
        "status": _status(row),
    }


def _status(row: Row) -> str:
    return Status(row.status).name.lower()
