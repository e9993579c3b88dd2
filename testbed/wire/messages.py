"""What travels between base station and node.

A message is one msgpack header of at most 4 KiB and, for parts of a block, one raw payload frame
(`quantization.py`). The header's size is checked before it is parsed; kind, number of fields, types, ranges and
lengths are checked while it is parsed (msgspec), before anything is allocated for them.

    node -> BS    Hello  Heartbeat  Announce  Credit  ReplyPart  Rejected
    BS -> node    Welcome  HelloAgain  Refuse  RequestPart  Goodbye  Echo  Shape
"""

from __future__ import annotations

import math
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from testbed.errors import MessageError
from testbed.wire.quantization import SchemeName

PROTOCOL_VERSION = 5
MAX_HEADER_BYTES = 4096
MAX_TEXT = 512  # characters
MAX_SEGMENTS = 512
MAX_FIGURES = 48
LOWEST_BITS_PER_S, HIGHEST_BITS_PER_S = 1e3, 1e11  # of a rate that is asked for

# A field's type, and what it must hold to be accepted from the wire.
U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Duration = Annotated[int, Meta(ge=0, le=2**62)]
Count = Annotated[int, Meta(ge=1, le=2**16 - 1)]
RowCount = Annotated[int, Meta(ge=1, le=2**22)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Expert = Annotated[int, Meta(ge=0, le=2**15 - 1)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Figures = Annotated[dict[Text, float | None], Meta(max_length=MAX_FIGURES)]
Held = Annotated[list[U16], Meta(max_length=MAX_SEGMENTS)]
Segments = Annotated[list[tuple[Expert, RowCount]], Meta(min_length=1, max_length=MAX_SEGMENTS)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Travels as a msgpack list of its kind and its fields in order."""


class Hello(Message, frozen=True, tag=0):
    """A node introduces itself; the BS binds `device` to the CURVE key that sent this."""

    protocol: Annotated[int, Meta(ge=0, le=2**31)]
    device: Text
    boot_id: U64  # drawn at process start: a restarted node is a new one
    manifest_sha256: Text
    experts_held: Held
    emulated: Figures  # what its compute is padded to; empty: as fast as it is
    computes: Text = ""  # on what and in which weights, for the log: "torch cuda float16 (Orin)", "numpy float32"

    def __post_init__(self) -> None:
        require_finite(*self.emulated.values())


class Heartbeat(Message, frozen=True, tag=1):
    """Sent by the loop that computes, so that a hung node falls silent."""

    sent_ns: U64  # the node's monotonic clock
    figures: Figures
    echoed: tuple[U64, U64] | None = None  # the last echo: BS's clock when it was sent, ours when it was read

    def __post_init__(self) -> None:
        require_finite(*self.figures.values())


class Announce(Message, frozen=True, tag=2):
    """Before a long block: no sign of life will come for about `estimate_ns`, and that is no reason to worry."""

    round: U64
    rows: RowCount
    estimate_ns: Duration


class Credit(Message, frozen=True, tag=3):
    """Bytes of the current block that have arrived: opens the sender's window."""

    round: U64
    attempt: U16
    received_bytes: U64


class RequestPart(Message, frozen=True, tag=3):
    """Part `part` of a block of `rows` rows, followed by its payload; `parts.py` says which rows it carries."""

    run: U64
    round: U64
    attempt: U16
    layer: U16
    part: U16
    parts: Count
    rows: RowCount
    width: Width
    padded_width: Width  # rows are filled up to this many values on the wire, to weigh what a wider model's would
    scheme: SchemeName
    reply_scheme: SchemeName
    segments: Segments


class ReplyPart(Message, frozen=True, tag=4):
    """Part of the experts' outputs, rows in the order of the request, and where the node's time went."""

    run: U64
    round: U64
    attempt: U16
    part: U16
    parts: Count
    rows: RowCount
    width: Width
    padded_width: Width
    scheme: SchemeName
    received_ns: U64  # the node's monotonic clock when the last part of the request was read
    sent_ns: U64  # ... when the first part of the reply was handed to the socket
    queue_ns: Duration
    dequantise_ns: Duration
    compute_ns: Duration
    padding_ns: Duration  # emulated compute time added after the real one
    quantise_ns: Duration
    staging_ns: Duration | None = None  # of the compute: copies between host and GPU; None where there is none


class Rejected(Message, frozen=True, tag=5):
    """The node will not compute this block; it says why."""

    round: U64
    attempt: U16
    reason: Text


class Welcome(Message, frozen=True, tag=0):
    """The BS takes the node into the run."""

    run: U64
    heartbeat_ns: Annotated[int, Meta(ge=10**6, le=10**12)]
    window_bytes: Annotated[int, Meta(ge=1, le=2**31)]  # a block above this needs credit to come whole


class HelloAgain(Message, frozen=True, tag=1):
    """The BS does not know this connection (it was restarted, or the link was): introduce yourself again."""


class Refuse(Message, frozen=True, tag=2):
    """The BS will not work with this node, and waiting will not change that."""

    reason: Text


class Echo(Message, frozen=True, tag=5):
    """Answers a heartbeat at once, so that the two clocks can be compared by the smallest of messages."""

    sent_ns: U64  # the base station's monotonic clock


class Shape(Message, frozen=True, tag=6):
    """From now until the next welcome the node is to send no faster than this, counted in TCP payload."""

    up_bits_per_s: float

    def __post_init__(self) -> None:
        if not LOWEST_BITS_PER_S <= self.up_bits_per_s <= HIGHEST_BITS_PER_S:
            need = f"it must be from {LOWEST_BITS_PER_S:g} to {HIGHEST_BITS_PER_S:g}"
            raise ValueError(f"an uplink rate of {self.up_bits_per_s:g} bit/s: {need}")


class Goodbye(Message, frozen=True, tag=4):
    """The run is over."""


M = TypeVar("M")

FromNode = Hello | Heartbeat | Announce | Credit | ReplyPart | Rejected
FromBaseStation = Welcome | HelloAgain | Refuse | RequestPart | Goodbye | Echo | Shape

_ENCODER = msgspec.msgpack.Encoder()
_FROM_NODE: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)
_FROM_BASE_STATION: msgspec.msgpack.Decoder[FromBaseStation] = msgspec.msgpack.Decoder(FromBaseStation)


def require_finite(*figures: float | None) -> None:
    """Raises ValueError unless each is a finite number or None, where nothing was measured."""
    if not all(figure is None or math.isfinite(figure) for figure in figures):
        raise ValueError("a figure is not a finite number")


def encode(message: Message) -> bytes:
    """Header bytes of a message. Raises MessageError for more than 4 KiB, or a text that is not Unicode."""
    try:
        header = _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        raise MessageError(f"{type(message).__name__}: a text is not Unicode: {error.reason}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(
            f"{type(message).__name__}: header of {len(header)} bytes, at most {MAX_HEADER_BYTES} travel"
        )
    return header


def decode_from_node(header: bytes) -> FromNode:
    """A message sent by a node, checked. Raises MessageError."""
    return _decode(_FROM_NODE, header)


def decode_from_base_station(header: bytes) -> FromBaseStation:
    """A message sent by the base station, checked. Raises MessageError."""
    return _decode(_FROM_BASE_STATION, header)


def _decode(decoder: msgspec.msgpack.Decoder[M], header: bytes) -> M:
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(f"header of {len(header)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        return decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(f"header is not a message of ours: {error!s:.120}") from error
