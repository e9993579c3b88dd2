from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from testbed.errors import ConfigError, MessageError
from testbed.wire.kept import KeptRows
from testbed.wire.kernels import SCALE_BYTES
from testbed.wire.quantization import (
    SCHEMES,
    Scheme,
    accumulate,
    dequantise,
    quantise,
    received,
    scheme_named,
)

Block = NDArray[np.float32]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)

INT8_ZERO_BELOW = 127 * 2.0**-126


def row_of(kind: str, width: int, rng: np.random.Generator) -> Block:
    row = rng.standard_normal(width) * 10.0 ** rng.uniform(-6, 4)
    if kind == "zero":
        row[:] = 0
    elif kind == "subnormal":
        row = rng.uniform(-1, 1, width) * 2.0**-126
    elif kind == "tiny":
        row = rng.uniform(-1, 1, width) * INT8_ZERO_BELOW * 2
    elif kind == "small halves":
        row = rng.uniform(-1, 1, width) * 2.0**-13
    elif kind == "outlier":
        row[rng.integers(width)] *= 1000
    elif kind == "ties":
        row = rng.integers(-254, 255, width) / 2
        row[0] = 127
    clipped: Block = np.clip(row, -65504, 65504).astype(np.float32)
    return clipped


KINDS = ["plain", "zero", "subnormal", "tiny", "small halves", "outlier", "ties"]


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Rows of different kinds, each of its own magnitude."""
    width = draw(st.sampled_from([1, 2, 3, 7, 31, 33, 64, 101, 256]))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.stack([row_of(kind, width, rng) for kind in kinds])


def any_values(scheme: Scheme) -> st.SearchStrategy[Block]:
    values = st.floats(-scheme.largest, scheme.largest, width=32)
    return hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=values)


def values_of(rows_TB: NDArray[np.uint8], scheme: Scheme) -> NDArray[Any]:
    kinds = {"int8": np.int8, "fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}
    return rows_TB[:, SCALE_BYTES if scheme.has_scales else 0 :].copy().view(kinds[scheme.name])


def scales_of(rows_TB: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale_T: NDArray[np.float32] = rows_TB[:, :SCALE_BYTES].copy().view("<f4")[:, 0]
    return scale_T


def int8_rows(scale_R: NDArray[np.float32], values_RD: NDArray[np.int8]) -> bytes:
    rows = zip(scale_R.astype("<f4"), values_RD.astype(np.int8), strict=True)
    return b"".join(scale.tobytes() + values_D.tobytes() for scale, values_D in rows)


def decoded(payload: Any, shape: tuple[int, ...], scheme: Scheme) -> Block:
    rows, width = shape
    out_RD = np.full(shape, np.nan, np.float32)
    dequantise(payload, rows, width, scheme, out_RD)
    return out_RD


def there_and_back(hidden_TD: Block, scheme: Scheme) -> Block:
    return decoded(quantise(hidden_TD, scheme).tobytes(), hidden_TD.shape, scheme)


def nearest_bf16(value: np.float32) -> int:
    below = int(np.float32(value).view(np.uint32)) >> 16
    exact = [np.array(bits << 16, np.uint32).view(np.float32).astype(np.float64) for bits in (below, below + 1)]
    off_below, off_above = abs(float(value) - exact[0]), abs(float(value) - exact[1])
    return below if (off_below, below % 2) < (off_above, (below + 1) % 2) else below + 1


def slowly_quantised(hidden_TD: Block, scheme: Scheme) -> tuple[NDArray[Any], list[np.float32] | None]:
    if scheme.name == "fp32":
        return hidden_TD, None
    if scheme.name == "fp16":
        return hidden_TD.astype(np.float16), None
    if scheme.name == "bf16":
        return np.array([[nearest_bf16(value) for value in row] for row in hidden_TD], np.uint16), None
    values, scales = [], []
    for row in hidden_TD:
        row_max = np.abs(row).max()
        tiny = row_max < np.float32(INT8_ZERO_BELOW)
        scales.append(np.float32(0) if tiny else row_max / np.float32(127))
        steps = np.float32(0) if tiny else np.float32(127) / row_max
        values.append([int(np.rint(value * steps)) for value in row])
    return np.array(values, np.int8), scales


def slowly_decoded(values_TD: NDArray[Any], scales: list[np.float32] | None, scheme: Scheme) -> Block:
    if scales is not None:
        return np.array([[np.float32(q) * scale for q in row] for row, scale in zip(values_TD, scales, strict=True)])
    if scheme.name == "bf16":
        return (values_TD.astype(np.uint32) << 16).view(np.float32)
    return values_TD.astype(np.float32)


def assert_same_bits(ours: NDArray[Any], expected: NDArray[Any]) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.tobytes() == expected.tobytes()


def assert_equals_the_slow_way(hidden_TD: Block, scheme: Scheme) -> None:
    rows_TB = quantise(hidden_TD, scheme)
    values_TD, scales = slowly_quantised(hidden_TD, scheme)
    assert rows_TB.shape == (len(hidden_TD), scheme.row_bytes(hidden_TD.shape[1]))
    assert_same_bits(values_of(rows_TB, scheme), values_TD)
    if scales is not None:
        assert_same_bits(scales_of(rows_TB), np.array(scales, np.float32))
    assert_same_bits(there_and_back(hidden_TD, scheme), slowly_decoded(values_TD, scales, scheme))


def assert_within_the_stated_bound(hidden_TD: Block, scheme: Scheme) -> None:
    x = hidden_TD.astype(np.float64)
    error = np.abs(x - there_and_back(hidden_TD, scheme))
    row_max = np.abs(x).max(axis=1, keepdims=True)
    if scheme.name == "int8":
        steps = scales_of(quantise(hidden_TD, scheme)).astype(np.float64)[:, None] * (1 / 2 + 2**-15)
        bound = np.where(row_max < INT8_ZERO_BELOW, np.abs(x), steps)
    elif scheme.name == "fp16":
        bound = np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)
    elif scheme.name == "bf16":
        bound = np.maximum(np.abs(x) * 2.0**-8, 2.0**-134)
    else:
        bound = np.zeros_like(x)
    assert (error <= bound).all()


@every_scheme
@given(data=st.data())
def test_every_scheme_equals_a_slow_reference_bit_for_bit(scheme: Scheme, data: st.DataObject) -> None:
    assert_equals_the_slow_way(data.draw(blocks() | any_values(scheme)), scheme)


@every_scheme
@given(data=st.data())
def test_the_error_stays_within_the_stated_bound(scheme: Scheme, data: st.DataObject) -> None:
    assert_within_the_stated_bound(data.draw(blocks() | any_values(scheme)), scheme)


@every_scheme
def test_a_wide_block_of_varied_rows_equals_the_slow_reference_within_the_bound(scheme: Scheme) -> None:
    rng = np.random.default_rng(3)
    hidden_TD = np.stack([row_of(kind, 1031, rng) for kind in KINDS])
    assert_equals_the_slow_way(hidden_TD, scheme)
    assert_within_the_stated_bound(hidden_TD, scheme)


def test_every_number_of_two_bytes_survives_decoding_and_encoding() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits[bits & 0x7C00 != 0x7C00][:, None]
    assert_same_bits(decoded(half.tobytes(), half.shape, SCHEMES["fp16"]), half.view(np.float16).astype(np.float32))
    brain = bits[bits & 0x7F80 != 0x7F80][:, None]
    brain_values = (brain.astype(np.uint32) << 16).view(np.float32)
    assert_same_bits(decoded(brain.tobytes(), brain.shape, SCHEMES["bf16"]), brain_values)
    assert_same_bits(values_of(quantise(brain_values, SCHEMES["bf16"]), SCHEMES["bf16"]), brain)


def test_halfway_between_two_fp16_numbers_and_next_to_it_rounds_as_numpy_does() -> None:
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (half[:-1] + half[1:]) / 2
    x = np.concatenate([half, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e5))])
    hidden_TD = np.stack([x, -x])
    assert_same_bits(values_of(quantise(hidden_TD, SCHEMES["fp16"]), SCHEMES["fp16"]), hidden_TD.astype(np.float16))


def test_int8_carries_a_zero_row_as_zeros_and_reaches_127_both_ways() -> None:
    rows_TB = quantise(np.array([[0, -0.0, 0], [2, -1, -2]], np.float32), SCHEMES["int8"])
    assert scales_of(rows_TB).tolist() == [0, np.float32(2) / np.float32(127)]
    assert values_of(rows_TB, SCHEMES["int8"]).tolist() == [[0, 0, 0], [127, -64, -127]]


@every_scheme
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(scheme: Scheme, bad: float) -> None:
    hidden_TD = np.ones((20, 33), np.float32)
    hidden_TD[17, 32] = bad
    with pytest.raises(MessageError, match=f"^row 17 of 20 to send has a NaN.*{scheme.name} cannot carry.*choose"):
        quantise(hidden_TD, scheme)


@every_scheme
def test_the_largest_value_passes_and_the_next_one_is_refused(scheme: Scheme) -> None:
    largest = np.float32(scheme.largest)
    assert_same_bits(np.sign(there_and_back(np.array([[largest, -largest]]), scheme)), np.array([[1, -1]], np.float32))
    assert_within_the_stated_bound(np.array([[largest, -largest]]), scheme)
    if scheme.name == "fp32":
        return
    with pytest.raises(MessageError, match="row 0 of 1"):
        quantise(np.array([[0, -np.nextafter(largest, np.float32(np.inf))]], np.float32), scheme)


def test_fp32_is_passed_on_without_a_copy() -> None:
    hidden_TD = np.ones((2, 3), np.float32)
    assert quantise(hidden_TD, SCHEMES["fp32"], KeptRows(np.uint8)).base is hidden_TD


@every_scheme
def test_read_only_blocks_are_taken(scheme: Scheme) -> None:
    hidden_TD = np.frombuffer(np.ones(6, np.float32).tobytes(), np.float32).reshape(2, 3)
    assert (there_and_back(hidden_TD, scheme) == 1).all()


@every_scheme
def test_kept_buffers_give_the_same_result_at_every_size(scheme: Scheme) -> None:
    room = KeptRows(np.uint8)
    for rows in (1, 16, 128, 3):
        hidden_TD = np.random.default_rng(rows).standard_normal((rows, 17)).astype(np.float32)
        kept, fresh = quantise(hidden_TD, scheme, room), quantise(hidden_TD, scheme)
        assert kept.tobytes() == fresh.tobytes()


def test_kept_buffers_are_used_again() -> None:
    room, hidden_TD = KeptRows(np.uint8), np.ones((16, 8), np.float32)
    first, second = quantise(hidden_TD, SCHEMES["int8"], room), quantise(hidden_TD[:5], SCHEMES["int8"], room)
    assert np.shares_memory(first, second)


@given(data=st.data(), hidden_TD=blocks())
@every_scheme
def test_any_rows_in_any_order_are_a_payload(scheme: Scheme, hidden_TD: Block, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(hidden_TD) - 1), max_size=30))
    payload = quantise(hidden_TD, scheme)[rows].tobytes()
    ours = decoded(payload, (len(rows), hidden_TD.shape[1]), scheme)
    assert_same_bits(ours, there_and_back(hidden_TD, scheme)[rows])


@every_scheme
@pytest.mark.parametrize("offset", range(9))
def test_payloads_are_read_at_any_address(scheme: Scheme, offset: int) -> None:
    hidden_TD = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)
    memory = bytes(offset) + quantise(hidden_TD, scheme).tobytes()
    assert_same_bits(decoded(memoryview(memory)[offset:], (3, 7), scheme), there_and_back(hidden_TD, scheme))
    assert_same_bits(decoded(memoryview(bytearray(memory))[offset:], (3, 7), scheme), there_and_back(hidden_TD, scheme))


@every_scheme
def test_payloads_are_read_from_bytes_and_from_frames(scheme: Scheme) -> None:
    hidden_TD = np.random.default_rng(2).standard_normal((5, 9)).astype(np.float32)
    payload = quantise(hidden_TD, scheme).tobytes()
    expected = there_and_back(hidden_TD, scheme)
    for came in (payload, zmq.Frame(payload).buffer):
        assert_same_bits(decoded(came, hidden_TD.shape, scheme), expected)


@every_scheme
@given(rows=st.integers(0, 9), width=st.integers(1, 9), size=st.integers(0, 500))
def test_a_payload_of_another_length_is_refused(scheme: Scheme, rows: int, width: int, size: int) -> None:
    if size == scheme.payload_bytes(rows, width):
        size += 1
    with pytest.raises(MessageError, match=f"payload of {size} bytes cannot be {rows} {scheme.name} rows"):
        decoded(bytes(size), (rows, width), scheme)


@every_scheme
@given(data=st.data())
def test_any_bytes_decode_to_finite_numbers_or_are_refused(scheme: Scheme, data: st.DataObject) -> None:
    size = scheme.payload_bytes(3, 5)
    payload = data.draw(st.binary(min_size=size, max_size=size))
    try:
        out_RD = decoded(payload, (3, 5), scheme)
    except MessageError:
        return
    assert np.isfinite(out_RD).all()


@every_scheme
@given(data=st.data(), padding=st.integers(0, 3))
def test_what_is_taken_as_it_came_is_just_what_can_be_decoded(
    scheme: Scheme, data: st.DataObject, padding: int
) -> None:
    size = scheme.payload_bytes(3, 5 + padding)
    payload, decodes, is_taken = data.draw(st.binary(min_size=size, max_size=size)), True, True
    try:
        dequantise(payload, 3, 5, scheme, np.empty((3, 5), np.float32), 5 + padding)
    except MessageError as error:
        decodes = str(error)
    try:
        received(payload, 3, 5, scheme, 5 + padding)
    except MessageError as error:
        is_taken = str(error)
    assert decodes == is_taken


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-3, -0.0, 2.0**121])
def test_a_scale_out_of_range_is_refused_with_its_row(bad: float) -> None:
    scale_R = np.array([1, bad, 1], np.float32)
    with pytest.raises(MessageError, match="int8 payload has a scale out of range in row 1 of 3"):
        decoded(int8_rows(scale_R, np.zeros((3, 5), np.int8)), (3, 5), SCHEMES["int8"])


def test_a_byte_that_we_never_send_still_decodes_to_a_finite_number() -> None:
    scale = np.nextafter(np.float32(2.0**121), np.float32(0))
    out_RD = decoded(scale.tobytes() + np.int8(-128).tobytes(), (1, 1), SCHEMES["int8"])
    assert out_RD[0, 0] == -np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("fp16", 0x7C00),
        ("fp16", 0xFC01),
        ("bf16", 0x7F80),
        ("bf16", 0xFFFF),
        ("fp32", 0x7F800000),
        ("fp32", 0xFFC00000),
    ],
)
def test_a_payload_value_that_is_not_finite_is_refused_with_its_row(name: str, bad: int) -> None:
    scheme = SCHEMES[name]
    values_RD = np.zeros((4, 33), f"u{scheme.bytes_per_value}")
    values_RD[2, 31] = bad
    with pytest.raises(MessageError, match=f"{name} payload has a value that is not finite in row 2 of 4"):
        decoded(values_RD.tobytes(), (4, 33), scheme)


def test_dequantise_refuses_an_output_of_another_shape() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        dequantise(bytes(32), 2, 4, SCHEMES["fp32"], np.zeros((4, 2), np.float32))


@given(hidden_RD=blocks(), data=st.data())
def test_accumulate_multiplies_then_adds_row_after_row(hidden_RD: Block, data: st.DataObject) -> None:
    rows = len(hidden_RD)
    token_R = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 4)))
    weight_R = data.draw(hnp.arrays(np.float32, rows, elements=st.floats(0, 1, width=32)))
    out_TD = np.ones((5, hidden_RD.shape[1]), np.float32)
    expected_TD = out_TD.copy()
    for y_D, weight, token in zip(hidden_RD, weight_R, token_R, strict=True):
        expected_TD[token] += y_D * weight
    accumulate(hidden_RD, weight_R, token_R, out_TD)
    assert_same_bits(out_TD, expected_TD)


def test_accumulate_refuses_tokens_outside_the_block_and_shapes_that_differ() -> None:
    y_RD, weight_R, out_TD = np.ones((2, 3), np.float32), np.ones(2, np.float32), np.zeros((4, 3), np.float32)
    for token in (-1, 4):
        with pytest.raises(IndexError, match=f"token {token} lies outside the block's 4"):
            accumulate(y_RD, weight_R, np.array([0, token]), out_TD)
    with pytest.raises(ValueError, match="do not belong together"):
        accumulate(y_RD, weight_R, np.array([0]), out_TD)


@pytest.mark.parametrize(("name", "row_bytes"), [("int8", 4100), ("fp16", 8192), ("bf16", 8192), ("fp32", 16384)])
def test_a_row_of_4096_values_takes_these_bytes(name: str, row_bytes: int) -> None:
    scheme = scheme_named(name)
    assert scheme.row_bytes(4096) == row_bytes
    assert scheme.payload_bytes(16, 4096) == 16 * row_bytes


def test_an_unknown_scheme_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="unknown quantisation scheme 'int7': choose one of int8, fp16, bf16, fp32"):
        scheme_named("int7")
