"""What travels between base station and node.

A message is one msgpack header of at most 4 KiB and, for parts of a block, one raw payload frame
(`quantization.py`). Limits are set before parsing; kind, fields, types and ranges are checked after it.

    node -> BS    Hello  Heartbeat  Announce  Credit  ReplyPart  Rejected
    BS -> node    Welcome  HelloAgain  Refuse  RequestPart  Goodbye
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import msgpack

from testbed.errors import MessageError
from testbed.wire.checks import (
    MAX_FIGURES,
    MAX_SEGMENTS,
    MAX_TEXT,
    Check,
    is_duration,
    is_figure,
    is_figures,
    is_held,
    is_row_count,
    is_segments,
    is_text,
    is_u16,
    is_u64,
    is_width,
    one_of,
    whole,
)

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 4096


# A field's type, and what it must hold to be accepted from the wire.
U16 = Annotated[int, is_u16]
U64 = Annotated[int, is_u64]
Duration = Annotated[int, is_duration]
RowCount = Annotated[int, is_row_count]
Width = Annotated[int, is_width]
Text = Annotated[str, is_text]
SchemeName = Annotated[str, one_of("int8", "fp16", "bf16", "fp32")]
Figure = Annotated[float | None, is_figure]
Figures = Annotated[dict[str, Any], is_figures]
Held = Annotated[list[int], is_held]
Segments = Annotated[list[list[int]], is_segments]


class Hello(NamedTuple):
    """A node introduces itself; the BS binds `device` to the CURVE key that sent this."""

    protocol: Annotated[int, whole(0, 2**31)]
    device: Text
    boot_id: U64  # drawn at process start: a restarted node is a new one
    manifest_sha256: Text
    experts_held: Held
    emulated_flops_per_s: Figure  # compute is padded to this; None: as fast as it is


class Heartbeat(NamedTuple):
    """Sent by the loop that computes, so that a hung node falls silent."""

    sent_ns: U64  # the node's monotonic clock
    figures: Figures


class Announce(NamedTuple):
    """Before a long block: no sign of life will come for about `estimate_ns`, and that is no reason to worry."""

    round: U64
    rows: RowCount
    estimate_ns: Duration


class Credit(NamedTuple):
    """Bytes of the current block that have arrived: opens the sender's window."""

    round: U64
    attempt: U16
    received_bytes: U64


class RequestPart(NamedTuple):
    """Part `part` of a block of `rows` rows, followed by its payload; `parts.py` says which rows it carries."""

    run: U64
    round: U64
    attempt: U16
    layer: U16
    part: U16
    parts: Annotated[int, whole(1, 2**16 - 1)]
    rows: RowCount
    width: Width
    scheme: SchemeName
    reply_scheme: SchemeName
    segments: Segments


class ReplyPart(NamedTuple):
    """Part of the experts' outputs, rows in the order of the request, and where the node's time went."""

    run: U64
    round: U64
    attempt: U16
    part: U16
    parts: Annotated[int, whole(1, 2**16 - 1)]
    rows: RowCount
    width: Width
    scheme: SchemeName
    received_ns: U64  # the node's monotonic clock when the last part of the request was read
    sent_ns: U64  # ... when the first part of the reply was handed to the socket
    queue_ns: Duration
    dequantise_ns: Duration
    compute_ns: Duration
    padding_ns: Duration  # emulated compute time added after the real one
    quantise_ns: Duration


class Rejected(NamedTuple):
    """The node will not compute this block; it says why."""

    round: U64
    attempt: U16
    reason: Text


class Welcome(NamedTuple):
    """The BS takes the node into the run."""

    run: U64
    heartbeat_ns: Annotated[int, whole(10**6, 10**12)]
    window_bytes: Annotated[int, whole(1, 2**31)]  # a block above this needs credit to come whole


class HelloAgain(NamedTuple):
    """The BS does not know this connection (it was restarted, or the link was): introduce yourself again."""


class Refuse(NamedTuple):
    """The BS will not work with this node, and waiting will not change that."""

    reason: Text


class Goodbye(NamedTuple):
    """The run is over."""


FROM_NODE = (Hello, Heartbeat, Announce, Credit, ReplyPart, Rejected)
FROM_BASE_STATION = (Welcome, HelloAgain, Refuse, RequestPart, Goodbye)


class _Layout(NamedTuple):
    """How one kind of message travels: its number, then its fields in order."""

    kind: int
    message_type: type
    names: tuple[str, ...]
    checks: tuple[Check, ...]

    def check(self, values: Sequence[Any]) -> None:
        for name, accepts, value in zip(self.names, self.checks, values, strict=True):
            if not accepts(value):
                raise MessageError(f"{self.message_type.__name__}.{name}: {_shown(value)} is not acceptable")


def _layouts(kinds: tuple[type, ...]) -> tuple[_Layout, ...]:
    return tuple(_Layout(kind, t, t._fields, checks_of(t)) for kind, t in enumerate(kinds))  # type: ignore[attr-defined]


def checks_of(message_type: type) -> tuple[Check, ...]:
    """What each field of a message must hold, in order."""
    return tuple(hint.__metadata__[0] for hint in get_type_hints(message_type, include_extras=True).values())


_FROM_NODE, _FROM_BASE_STATION = _layouts(FROM_NODE), _layouts(FROM_BASE_STATION)
_LAYOUT_OF = {layout.message_type: layout for layout in (*_FROM_NODE, *_FROM_BASE_STATION)}


def encode(message: Any) -> bytes:
    """Header bytes of a message: a msgpack list of its kind and its fields in order.

    Raises MessageError for what a receiver would not accept: a field out of its range, or more than 4 KiB.
    """
    layout = _LAYOUT_OF[type(message)]
    layout.check(message)
    try:
        header: bytes = msgpack.packb((layout.kind, *message))
    except UnicodeEncodeError as error:
        raise MessageError(f"{type(message).__name__}: a text is not Unicode: {error.reason}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(
            f"{type(message).__name__}: header of {len(header)} bytes, at most {MAX_HEADER_BYTES} travel"
        )
    return header


class PartHeaders:
    """Headers of all parts of a block. All fields but `part` are the same: checked and packed once."""

    def __init__(self, first: RequestPart | ReplyPart) -> None:
        self._message, self._first = first, encode(first)
        self._before = self._after = b""

    def of(self, part: int) -> bytes:
        if part == 0:
            return self._first
        if not self._before:
            self._split()
        header: bytes = self._before + msgpack.packb(part) + self._after
        return header

    def _split(self) -> None:
        layout = _LAYOUT_OF[type(self._message)]
        before = layout.names[: layout.names.index("part")]
        head = msgpack.Packer().pack_array_header(len(layout.names) + 1) + msgpack.packb(layout.kind)
        self._before = head + b"".join(msgpack.packb(getattr(self._message, name)) for name in before)
        self._after = self._first[len(self._before) + 1 :]  # `part` is 0 in the first one: a single byte


def decode_from_node(header: bytes) -> Any:
    """A message sent by a node, checked. Raises MessageError."""
    return _decode(header, _FROM_NODE)


def decode_from_base_station(header: bytes) -> Any:
    """A message sent by the base station, checked. Raises MessageError."""
    return _decode(header, _FROM_BASE_STATION)


def _decode(header: bytes, layouts: tuple[_Layout, ...]) -> Any:
    kind, *values = _parse(header)
    if type(kind) is not int or not 0 <= kind < len(layouts):
        raise MessageError(f"unknown message kind {_shown(kind)}")
    layout = layouts[kind]
    if len(values) != len(layout.names):
        raise MessageError(f"{layout.message_type.__name__}: {len(values)} fields instead of {len(layout.names)}")
    layout.check(values)
    return layout.message_type(*values)


def _parse(header: bytes) -> list[Any]:
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(f"header of {len(header)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        values = msgpack.unpackb(
            header,
            max_str_len=4 * MAX_TEXT,  # bytes: a character takes at most four
            max_bin_len=0,
            max_array_len=MAX_SEGMENTS,
            max_map_len=MAX_FIGURES,
            max_ext_len=0,
            strict_map_key=True,
            object_pairs_hook=_without_repeats,
        )
    except (ValueError, OverflowError, TypeError) as error:  # what msgpack raises for bytes that are not ours
        raise MessageError(f"header is not msgpack: {type(error).__name__}: {error!s:.80}") from error
    if type(values) is not list or not values:
        raise MessageError(f"header is {type(values).__name__}, not a list of kind and fields")
    return values


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    figures = dict(pairs)
    if len(figures) != len(pairs):
        raise ValueError("a key comes twice in a map")
    return figures


def _shown(value: Any) -> str:
    """For an error's line. What holds other values is only named: the repr of deep nesting would raise."""
    return f"{value!r:.80}" if type(value) in (int, float, str, bool, type(None)) else f"a {type(value).__name__}"
