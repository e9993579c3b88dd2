from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from testbed.errors import MessageError
from testbed.wire.kept import KeptRows
from testbed.wire.messages import ReplyPart, RequestPart
from testbed.wire.parts import MAX_BLOCK_BYTES, Assembler, ReceivedRows, part_count, part_rows, whole_block, whole_reply
from testbed.wire.quantization import SCHEMES, SchemeName, accumulate, dequantise, quantise

REQUEST = RequestPart(7, 3, 0, 1, 0, 4, 10, 6, 6, "int8", "fp16", [(2, 3), (6, 7)])
REPLY = ReplyPart(7, 3, 0, 0, 4, 10, 6, 6, "fp16", 10, 20, 1, 2, 3, 0, 4)
schemes = st.sampled_from(sorted(SCHEMES))


def hidden(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def payloads(x_RD: NDArray[np.float32], scheme: str, parts: int) -> list[bytes]:
    """The payload of every part of a block."""
    rows_RB = quantise(x_RD, SCHEMES[scheme])
    return [rows_RB[part_rows(len(x_RD), parts, part)].tobytes() for part in range(parts)]


@given(rows=st.integers(1, 5000), row_bytes=st.integers(1, 5000), part_bytes=st.integers(1, 70_000))
def test_parts_cover_every_row_exactly_once_in_order(rows: int, row_bytes: int, part_bytes: int) -> None:
    parts = part_count(rows, row_bytes, part_bytes)
    covered = [row for part in range(parts) for row in range(rows)[part_rows(rows, parts, part)]]
    assert covered == list(range(rows))


@given(rows=st.integers(1, 5000), row_bytes=st.integers(1, 5000), part_bytes=st.integers(1, 70_000))
def test_no_part_is_empty_and_none_is_above_part_bytes_unless_one_row_is(
    rows: int, row_bytes: int, part_bytes: int
) -> None:
    parts = part_count(rows, row_bytes, part_bytes)
    for part in range(parts):
        place = part_rows(rows, parts, part)
        in_part = place.stop - place.start
        assert in_part == 1 or 1 < in_part <= part_bytes // row_bytes


@given(rows=st.integers(1, 300), parts=st.integers(1, 400))
def test_a_claimed_number_of_parts_is_taken_only_if_it_leaves_none_empty(rows: int, parts: int) -> None:
    claim = replace(REQUEST, rows=rows, parts=parts)
    if all(part_rows(rows, parts, part).start < rows for part in range(parts)):
        Assembler(claim, KeptRows(np.float32))
    else:
        with pytest.raises(MessageError, match=f"{rows} rows do not travel in {parts} parts"):
            Assembler(claim, KeptRows(np.float32))


@given(shape=st.tuples(st.integers(1, 60), st.integers(1, 20)), scheme=schemes, data=st.data())
@pytest.mark.parametrize("first", [REQUEST, REPLY], ids=["request", "reply"])
def test_parts_in_any_order_give_what_the_whole_block_gives(
    first: Any, shape: tuple[int, int], scheme: str, data: st.DataObject
) -> None:
    (rows, width), part_bytes = shape, data.draw(st.integers(1, 900))
    parts = part_count(rows, SCHEMES[scheme].row_bytes(width), part_bytes)
    x_RD = hidden(rows, width, seed=rows)
    sent = payloads(x_RD, scheme, parts)
    order = data.draw(st.permutations(range(parts)))
    header = replace(first, rows=rows, width=width, padded_width=width, scheme=scheme, parts=parts)
    assembler = Assembler(replace(header, part=order[0]), KeptRows(np.float32))
    complete = [assembler.add(replace(header, part=part), memoryview(sent[part])) for part in order]
    whole_RD = np.empty_like(x_RD)
    dequantise(payloads(x_RD, scheme, 1)[0], rows, width, SCHEMES[scheme], whole_RD)
    assert complete == [False] * (parts - 1) + [True]
    assert assembler.block_RD.tobytes() == whole_RD.tobytes()
    assert assembler.payload_bytes == SCHEMES[scheme].payload_bytes(rows, width)


@given(rows=st.integers(1, 30), width=st.integers(1, 20), padding=st.integers(1, 50), scheme=schemes)
@pytest.mark.parametrize("first", [REQUEST, REPLY], ids=["request", "reply"])
def test_rows_filled_up_to_a_wider_models_weigh_what_those_would_and_say_the_same(
    first: Any, rows: int, width: int, padding: int, scheme: SchemeName
) -> None:
    x_RD, kind = hidden(rows, width, seed=rows), SCHEMES[scheme]
    payload = quantise(x_RD, kind, None, width + padding).tobytes()
    assert len(payload) == kind.payload_bytes(rows, width + padding)
    header = replace(first, rows=rows, width=width, padded_width=width + padding, scheme=scheme, parts=1)
    assembler = Assembler(header, KeptRows(np.float32))
    assert assembler.add(header, payload)
    plain_RD = np.empty_like(x_RD)
    dequantise(quantise(x_RD, kind).tobytes(), rows, width, kind, plain_RD)
    assert assembler.block_RD.tobytes() == plain_RD.tobytes()


def test_rows_cannot_be_filled_up_to_less_than_they_are() -> None:
    with pytest.raises(MessageError, match="rows of 6 values cannot be filled up to 5"):
        Assembler(replace(REQUEST, padded_width=5), KeptRows(np.float32))


def started(first: Any) -> tuple[Assembler, list[bytes]]:
    """A block of which part 0 has arrived."""
    sent = payloads(hidden(first.rows, first.width), first.scheme, first.parts)
    assembler = Assembler(first, KeptRows(np.float32))
    assert not assembler.add(first, sent[0])
    return assembler, sent


@pytest.mark.parametrize("first", [REQUEST, REPLY], ids=["request", "reply"])
@pytest.mark.parametrize("part", [0, 4, 5, 65535])
def test_a_repeated_part_and_one_that_does_not_exist_are_refused(first: Any, part: int) -> None:
    assembler, sent = started(first)
    before = assembler.block_RD.copy()
    with pytest.raises(MessageError, match=f"part {part} of 4 came twice or does not exist"):
        assembler.add(replace(first, part=part), sent[0])
    assert assembler.block_RD[:3].tobytes() == before[:3].tobytes()


@pytest.mark.parametrize(
    ("first", "change"),
    [
        *[(REQUEST, {name: 9}) for name in ("run", "round", "attempt", "layer", "rows", "width", "parts")],
        (REQUEST, {"scheme": "fp32"}),
        (REQUEST, {"reply_scheme": "fp32"}),
        (REQUEST, {"segments": [(2, 4), (6, 6)]}),
        *[(REPLY, {name: 9}) for name in ("run", "round", "attempt", "rows", "width", "parts", "compute_ns")],
        (REPLY, {"scheme": "fp32"}),
    ],
)
def test_a_part_that_contradicts_the_first_or_belongs_to_another_block_is_refused(
    first: Any, change: dict[str, Any]
) -> None:
    assembler, sent = started(first)
    with pytest.raises(MessageError, match="part 1 contradicts the first part of its block"):
        assembler.add(replace(first, part=1, **change), sent[1])


def test_a_reply_is_not_taken_into_a_request() -> None:
    assembler, sent = started(REQUEST)
    with pytest.raises(MessageError, match="contradicts"):
        assembler.add(replace(REPLY, part=1), sent[1])


@pytest.mark.parametrize("payload", [b"", b"x", bytes(1000)])
def test_a_payload_of_another_length_is_refused_and_may_come_again_rightly(payload: bytes) -> None:
    assembler, sent = started(REQUEST)
    with pytest.raises(MessageError, match="payload of"):
        assembler.add(replace(REQUEST, part=1), payload)
    assert [assembler.add(replace(REQUEST, part=part), sent[part]) for part in (1, 2, 3)] == [False, False, True]


def test_a_block_with_a_missing_part_is_never_complete() -> None:
    assembler, sent = started(REQUEST)
    assert not assembler.add(replace(REQUEST, part=1), sent[1])
    assert not assembler.add(replace(REQUEST, part=3), sent[3])


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 20)), scheme=schemes, padding=st.integers(0, 9), data=st.data()
)
def test_rows_added_up_as_they_came_are_bitwise_those_decoded_first(
    shape: tuple[int, int], scheme: SchemeName, padding: int, data: st.DataObject
) -> None:
    (rows, width), kind = shape, SCHEMES[scheme]
    parts = part_count(rows, kind.bytes_per_value * width, data.draw(st.integers(1, 900)))
    x_RD, rng = hidden(rows, width, seed=rows), np.random.default_rng(width)
    encoded_RB = quantise(x_RD, kind, None, width + padding)
    header = replace(REPLY, rows=rows, width=width, padded_width=width + padding, scheme=scheme, parts=parts)
    came, decoded = ReceivedRows(header), Assembler(header, KeptRows(np.float32))
    for part in data.draw(st.permutations(range(parts))):
        payload = encoded_RB[part_rows(rows, parts, part)].tobytes()
        assert came.add(replace(header, part=part), payload) == decoded.add(replace(header, part=part), payload)
    begin = data.draw(st.integers(0, rows - 1))
    some = slice(begin, data.draw(st.integers(begin, rows)))
    token_R, weight_R = rng.integers(0, 3, rows)[some], rng.random(rows, dtype=np.float32)[some]
    out_TD, expected_TD = np.ones((3, width), np.float32), np.ones((3, width), np.float32)
    came.accumulate(some, weight_R, token_R, out_TD)
    accumulate(decoded.block_RD[some], weight_R, token_R, expected_TD)
    assert out_TD.tobytes() == expected_TD.tobytes()


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 20)), scheme=schemes, padding=st.integers(0, 9))
def test_what_travelled_in_one_part_is_what_would_have_been_put_together(
    shape: tuple[int, int], scheme: SchemeName, padding: int
) -> None:
    (rows, width), kind = shape, SCHEMES[scheme]
    payload = quantise(hidden(rows, width, seed=rows), kind, None, width + padding).tobytes()
    request, reply = (
        replace(first, rows=rows, width=width, padded_width=width + padding, scheme=scheme, parts=1)
        for first in (REQUEST, REPLY)
    )
    assembler = Assembler(request, KeptRows(np.float32))
    assembler.add(request, payload)
    block_RD = whole_block(request, payload, KeptRows(np.float32), rows * width * 4)
    assert block_RD.tobytes() == assembler.block_RD.tobytes()
    one_R, token_R, out_TD = np.ones(rows, np.float32), np.arange(rows), np.zeros((rows, width), np.float32)
    whole_reply(reply, payload).accumulate(slice(0, rows), one_R, token_R, out_TD)
    assert (out_TD == block_RD).all()


@pytest.mark.parametrize(
    ("change", "payload", "match"),
    [
        ({"part": 1}, bytes(240), "part 1 of 1 does not exist"),
        ({"padded_width": 5}, bytes(240), "cannot be filled up"),
        ({}, bytes(239), "payload of 239 bytes cannot be 10 fp32 rows"),
        ({}, np.full(60, np.inf, np.float32).tobytes(), "not finite in row 0"),
        ({"rows": 2**20, "width": 2**10, "padded_width": 2**10}, bytes(240), "above the limit of"),
    ],
)
@pytest.mark.parametrize("first", [REQUEST, REPLY], ids=["request", "reply"])
def test_a_single_part_is_refused_as_an_assembler_refuses_it(
    first: Any, change: dict[str, Any], payload: bytes, match: str
) -> None:
    only = replace(first, **{"parts": 1, "scheme": "fp32", **change})
    with pytest.raises(MessageError, match=match):
        whole_block(only, payload, KeptRows(np.float32), MAX_BLOCK_BYTES)
    with pytest.raises(MessageError, match=match):
        whole_reply(only, payload)
    with pytest.raises(MessageError, match=match):
        Assembler(only, KeptRows(np.float32)).add(only, payload)


@pytest.mark.parametrize("change", [{"part": 4}, {"part": 0}, {"part": 1, "compute_ns": 9}])
def test_rows_kept_as_they_came_refuse_the_parts_that_an_assembler_refuses(change: dict[str, Any]) -> None:
    sent = payloads(hidden(REPLY.rows, REPLY.width), REPLY.scheme, REPLY.parts)
    came = ReceivedRows(REPLY)
    came.add(REPLY, sent[0])
    with pytest.raises(MessageError, match=r"contradicts|came twice or does not exist"):
        came.add(replace(REPLY, **change), sent[0])


class NoRoom(KeptRows[np.float32]):
    def take(self, rows: int, width: int) -> NDArray[np.float32]:
        pytest.fail(f"memory for {rows} x {width} was taken")


@pytest.mark.parametrize(
    ("change", "max_bytes"),
    [
        ({"rows": 2**22, "width": 2**20, "padded_width": 2**20, "parts": 1}, MAX_BLOCK_BYTES),
        ({"rows": 2**18, "width": 2**10 + 1, "padded_width": 2**11, "parts": 1}, MAX_BLOCK_BYTES),
        ({}, 10 * 6 * 4 - 1),
        ({"parts": 11}, MAX_BLOCK_BYTES),
        ({"parts": 65535}, MAX_BLOCK_BYTES),
    ],
)
def test_a_claim_that_cannot_be_is_refused_before_memory_is_taken(change: dict[str, Any], max_bytes: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match=r"above the limit of|do not travel in"):
            Assembler(replace(REQUEST, **change), NoRoom(np.float32), max_bytes)
        if replace(REQUEST, **change).parts == 1:
            with pytest.raises(MessageError, match="above the limit of"):
                whole_block(replace(REQUEST, **change), b"", NoRoom(np.float32), max_bytes)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_block_of_exactly_the_limit_is_taken() -> None:
    Assembler(REQUEST, KeptRows(np.float32), max_bytes=10 * 6 * 4)


def test_kept_rows_use_their_memory_again_and_grow_only_when_they_must() -> None:
    room = KeptRows(np.float32)
    large = room.take(8, 5)
    assert large.shape == (8, 5)
    for rows, width in ((8, 5), (1, 1), (4, 10), (5, 8)):
        taken = room.take(rows, width)
        assert taken.shape == (rows, width)
        assert taken.flags.c_contiguous
        assert np.shares_memory(taken, large)
    assert not np.shares_memory(room.take(9, 5), large)
