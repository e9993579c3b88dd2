from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from testbed.errors import MessageError
from testbed.wire.messages import (
    HIGHEST_BITS_PER_S,
    LOWEST_BITS_PER_S,
    MAX_FIGURES,
    MAX_HEADER_BYTES,
    MAX_SEGMENTS,
    MAX_TEXT,
    Announce,
    Credit,
    FromBaseStation,
    FromNode,
    Heartbeat,
    Hello,
    Message,
    Refuse,
    Rejected,
    ReplyPart,
    RequestPart,
    Shape,
    decode_from_base_station,
    decode_from_node,
    encode,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT)
figure = st.none() | st.floats(allow_nan=False, allow_infinity=False)
u16, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**63 - 1)
scheme = st.sampled_from(["int8", "fp16", "bf16", "fp32"])
row_count, duration = st.integers(1, 2**22), st.integers(0, 2**62)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "protocol": st.integers(0, 2**31),
    "device": text,
    "boot_id": u64,
    "manifest_sha256": text,
    "experts_held": st.lists(u16, max_size=MAX_SEGMENTS),
    "computes": text,
    "emulated": st.dictionaries(st.text("abc_é", max_size=12), figure, max_size=MAX_FIGURES),
    "sent_ns": u64,
    "echoed": st.none() | st.tuples(u64, u64),
    "figures": st.dictionaries(st.text("abc_é", max_size=12), figure, max_size=MAX_FIGURES),
    "run": u64,
    "round": u64,
    "rows": row_count,
    "estimate_ns": duration,
    "attempt": u16,
    "received_bytes": u64,
    "layer": u16,
    "part": u16,
    "parts": st.integers(1, 2**16 - 1),
    "width": st.integers(1, 2**20),
    "padded_width": st.integers(1, 2**20),
    "scheme": scheme,
    "reply_scheme": scheme,
    "segments": st.lists(st.tuples(st.integers(0, 2**15 - 1), row_count), min_size=1, max_size=400),
    "received_ns": u64,
    "queue_ns": duration,
    "dequantise_ns": duration,
    "compute_ns": duration,
    "padding_ns": duration,
    "staging_ns": st.none() | duration,
    "quantise_ns": duration,
    "reason": text,
    "heartbeat_ns": st.integers(10**6, 10**12),
    "window_bytes": st.integers(1, 2**31),
    "up_bits_per_s": st.floats(LOWEST_BITS_PER_S, HIGHEST_BITS_PER_S),
}


def messages_of(kind: type[Message]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: FIELDS[name] for name in kind.__struct_fields__})


FROM_NODE, FROM_BASE_STATION = get_args(FromNode), get_args(FromBaseStation)
from_node = st.one_of([messages_of(kind) for kind in FROM_NODE])
from_base_station = st.one_of([messages_of(kind) for kind in FROM_BASE_STATION])
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)

REQUEST = RequestPart(7, 3, 0, 1, 0, 1, 5, 16, 16, "int8", "fp16", [(2, 3), (6, 2)])
WHOLE_NUMBERS = {
    "run", "round", "attempt", "layer", "part", "parts", "rows", "width", "received_ns", "sent_ns", "queue_ns",
    "dequantise_ns", "compute_ns", "padding_ns", "quantise_ns",
}  # fmt: skip
REPLY = ReplyPart(7, 3, 0, 0, 1, 5, 16, 16, "fp16", 10, 20, 1, 2, 3, 0, 4)


def packed(*values: Any) -> bytes:
    header: bytes = msgpack.packb(values)
    return header


def either_way(header: bytes) -> list[Any]:
    """What the two sides make of a header: messages and MessageErrors, anything else fails the test."""
    return [opened(decode, header) for decode in (decode_from_node, decode_from_base_station)]


def opened(decode: Callable[[bytes], Any], header: bytes) -> Any:
    try:
        return decode(header)
    except MessageError as error:
        return error


def assert_refused(header: bytes) -> None:
    for result in either_way(header):
        assert isinstance(result, MessageError), result
        assert "\n" not in str(result)
        assert len(str(result)) < 200


@pytest.mark.parametrize("kind", FROM_NODE)
@given(data=st.data())
def test_every_message_of_a_node_arrives_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages_of(kind))
    header = encode(message)
    assert len(header) <= MAX_HEADER_BYTES
    assert decode_from_node(header) == message


@pytest.mark.parametrize("kind", FROM_BASE_STATION)
@given(data=st.data())
def test_every_message_of_the_base_station_arrives_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages_of(kind))
    header = encode(message)
    assert len(header) <= MAX_HEADER_BYTES
    assert decode_from_base_station(header) == message


@given(from_node, from_base_station)
def test_no_message_is_taken_for_one_of_the_other_direction(node_message: Any, station_message: Any) -> None:
    with pytest.raises(MessageError):
        decode_from_base_station(encode(node_message))
    with pytest.raises(MessageError):
        decode_from_node(encode(station_message))


@given(st.binary(max_size=MAX_HEADER_BYTES + 1))
def test_arbitrary_bytes_are_a_message_error(header: bytes) -> None:
    for result in either_way(header):
        assert isinstance(result, MessageError) or encode(result)


@given(st.lists(anything, max_size=16), st.integers(-1, 8))
def test_arbitrary_fields_are_a_message_error_or_a_message_in_order(values: list[Any], kind: int) -> None:
    try:
        header = packed(kind, *values)
    except OverflowError:  # beyond 64 bits
        return
    for result in either_way(header):
        assert isinstance(result, MessageError) or encode(result)


@given(from_node | from_base_station, st.data())
def test_a_cut_or_lengthened_header_is_refused(message: Any, data: st.DataObject) -> None:
    header = encode(message)
    assert_refused(header[: data.draw(st.integers(0, len(header) - 1))])
    assert_refused(header + data.draw(st.binary(min_size=1, max_size=64)))


@given(from_node | from_base_station, st.data())
def test_a_header_with_flipped_bits_is_refused_or_still_keeps_every_rule(message: Any, data: st.DataObject) -> None:
    header = bytearray(encode(message))
    for bit in data.draw(st.lists(st.integers(0, len(header) * 8 - 1), min_size=1, max_size=8)):
        header[bit // 8] ^= 1 << bit % 8
    for result in either_way(bytes(header)):
        assert isinstance(result, MessageError) or encode(result)


@pytest.mark.parametrize("size", [4097, 10**6])
def test_a_header_above_4096_bytes_is_refused_before_it_is_parsed(size: int) -> None:
    for result in either_way(b"\xc1" + bytes(size - 1)):  # parsing would stop at the first byte
        assert str(result) == f"header of {size} bytes, at most 4096 are read"


@pytest.mark.parametrize(
    "header",
    [
        b"\xdc\x03\xe8" * 2333,  # 7 000 bytes that made 54 MB
        b"\xdc\x0b\xb0" * 1000,
        b"\xdc\x02\x00" * 1365,
        b"\xdc\x02\x00" * 1023,
        b"\xdd\x00\x00\x02\x00" * 800,
        b"\xde\x00\x30" * 1000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_a_small_header_cannot_claim_much_memory(header: bytes) -> None:
    tracemalloc.start()
    try:
        assert_refused(header)
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [1, 2, 10, 500, 990, 1000, 1010, 1022, 1023, 1024, 4000])
def test_nested_arrays_and_maps_are_refused_at_any_depth(depth: int) -> None:
    arrays = b"\x91" * depth + b"\x00"
    maps = b"\x81\xa1k" * (depth // 3 + 2) + b"\x00"
    for nested in (arrays, maps):
        assert_refused(nested)
        assert_refused(b"\x93\x01\x00" + nested)  # as a heartbeat's figures
        assert_refused(b"\x92\x02" + nested)  # as the reason of a refusal


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x90",
        b"\xc0",
        b"\x80",
        b"\xa5hello",
        b"\xc1",
        packed([0]),
        packed(None),
        packed(True),
        packed(1.0),
        packed("0"),
        packed(-1),
        packed(7),
        packed(99, 1, 2, 3),
        packed(2**64 - 1),
        packed({}),
        b"\x80\x05\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94.",  # a pickle
    ],
)
def test_what_is_no_list_of_a_known_kind_and_its_fields_is_refused(header: bytes) -> None:
    assert_refused(header)


@pytest.mark.parametrize("kind", range(7))
def test_a_field_too_many_or_too_few_is_refused(kind: int) -> None:
    lengths = {len(kinds[kind].__struct_fields__) for kinds in (FROM_NODE, FROM_BASE_STATION) if kind < len(kinds)}
    for length in set(range(20)) - lengths:
        assert_refused(packed(kind, *[1] * length))


@pytest.mark.parametrize(
    "extension",
    [
        b"\xd4\x01\x00",
        b"\xd6\xff\x00\x00\x00\x00",  # timestamps
        b"\xd7\xff" + bytes(8),
        b"\xc7\x0c\xff" + bytes(8) + b"\x00\x00\x00\x03",
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\xc7\x00\x01",
        b"\xc7\x00\xff",
        b"\xc4\x01x",  # binary
        b"\xc4\x00",
    ],
)
def test_extension_types_and_binary_are_refused_wherever_they_stand(extension: bytes) -> None:
    for header in (
        extension,
        b"\x91" + extension,
        b"\x92\x02" + extension,
        b"\x93\x01\x00" + extension,
        b"\x93\x01\x00\x81\xa1k" + extension,
        b"\x93\x01\x00\x81" + extension + b"\x00",
    ):
        assert_refused(header)


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), float("-inf"), True, False, "1", [], {}, [1.0], {"k": 1.0}]
)
def test_a_figure_must_be_a_finite_number(bad: Any) -> None:
    assert_refused(packed(1, 1, {"cpu_percent": bad}))
    assert_refused(packed(0, 1, "near", 1, "0" * 64, [1], {"row_s": bad}))
    if isinstance(bad, float):
        with pytest.raises(ValueError, match="not a finite number"):
            Heartbeat(1, {"cpu_percent": bad})
        with pytest.raises(ValueError, match="not a finite number"):
            Hello(1, "near", 1, "0" * 64, [1], {"row_s": bad})


@pytest.mark.parametrize(
    "bad", [0, -5e6, 999.0, 1.001e11, float("nan"), float("inf"), float("-inf"), True, None, "5e6", [5e6], 2**64 - 1]
)
def test_an_uplink_rate_is_a_number_of_bits_per_second_within_its_range(bad: Any) -> None:
    assert decode_from_base_station(packed(6, 5_000_000)) == Shape(5e6)
    assert_refused(packed(6, bad))
    if isinstance(bad, float):
        with pytest.raises(ValueError, match="must be from 1000 to 1e\\+11"):
            Shape(bad)


@pytest.mark.parametrize("figures", [b"\x81\x01\x01", b"\x81\xc0\x01", b"\x81\x90\x01"])
def test_a_key_that_is_no_text_is_refused(figures: bytes) -> None:
    assert decode_from_node(b"\x93\x01\x00\x81\xa1k\x01") == Heartbeat(0, {"k": 1})
    assert_refused(b"\x93\x01\x00" + figures)


@pytest.mark.parametrize("message", [REQUEST, REPLY], ids=["request", "reply"])
@pytest.mark.parametrize("bad", [True, None, -1, 2**63, 2**64 - 1, 1.0, "1", [1]])
def test_a_whole_number_is_nothing_else_and_within_its_range(message: Any, bad: Any) -> None:
    for name in WHOLE_NUMBERS & set(message.__struct_fields__):
        assert_refused(packed_with(message, **{name: bad}))


def packed_with(message: Any, **changed: Any) -> bytes:
    """The header of a message of which some fields are what they must not be."""
    kind, *values = msgpack.unpackb(encode(message))
    fields = dict(zip(message.__struct_fields__, values, strict=True)) | changed
    return packed(kind, *fields.values())


@pytest.mark.parametrize("name", ["rows", "width", "parts"])
def test_a_block_has_at_least_one_row_one_column_and_one_part(name: str) -> None:
    assert_refused(packed_with(REQUEST, **{name: 0}))
    assert_refused(packed_with(REPLY, **{name: 0}))


@pytest.mark.parametrize("bad", ["int4", "INT8", "", "pickle", b"int8", ["int8"], None, 8])
def test_an_unknown_scheme_is_refused(bad: Any) -> None:
    assert_refused(packed_with(REQUEST, scheme=bad))
    assert_refused(packed_with(REQUEST, reply_scheme=bad))
    assert_refused(packed_with(REPLY, scheme=bad))


@pytest.mark.parametrize(
    "bad", [[], [[]], [[1]], [[1, 0]], [[1, 2, 3]], [[-1, 2]], [[2**15, 2]], [[1, 2**22 + 1]], [[1, True]], [1, 2], {}]
)
def test_segments_are_pairs_of_an_expert_and_its_rows(bad: Any) -> None:
    assert_refused(packed_with(REQUEST, segments=bad))


@pytest.mark.parametrize(
    "header",
    [
        packed_with(REQUEST, segments=[[e, 1] for e in range(513)]),
        packed_with(Rejected(1, 0, ""), reason="x" * 513),
        packed_with(Refuse(""), reason="x" * 513),
        packed_with(Hello(1, "near", 1, "0" * 64, [1], {}), experts_held=[1] * 513),
        packed_with(Heartbeat(1, {}), figures={f"figure {n}": 1.0 for n in range(49)}),
        packed_with(Announce(1, 1, 1), round=2**63),
        packed_with(Credit(1, 1, 1), attempt=2**16),
    ],
)
def test_what_is_too_long_or_too_large_is_refused(header: bytes) -> None:
    assert_refused(header)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (replace(REQUEST, segments=[(300 + e, 2**22) for e in range(500)]), "RequestPart: header of .* at most 4096"),
        (Refuse("no\ud800text"), "Refuse: a text is not Unicode"),
        (Heartbeat(1, {f"{n:0512}": 1.0 for n in range(48)}), "Heartbeat: header of .* at most 4096"),
    ],
)
def test_encode_refuses_a_header_that_nobody_would_read(message: Any, words: str) -> None:
    with pytest.raises(MessageError, match=f"^{words}"):
        encode(message)


def test_a_reason_in_any_script_may_have_all_its_512_characters() -> None:
    for character in ("x", "é", "漢", "🛰"):
        reason = Rejected(1, 0, character * MAX_TEXT)
        assert decode_from_node(encode(reason)) == reason
