"""The compiled loops of replies: rows that are checked when they come and decoded while they are added up.

Each works row by row and returns the first row that it refuses, or NO_ROW. No fastmath: `kernels.py` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write
from testbed.wire.kernels import (
    INFINITY,
    NO_ROW,
    SCALE_BOUND_BITS,
    SCALE_BYTES,
    as_float,
    bfloat_as_float,
    half_as_float,
    max_magnitude,
    scale_bits,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADD = read(types.float32, 1), read(types.int64, 1), write(types.float32, 2)  # weights, tokens, their sums


@native(read(types.uint8, 2))
def check_int8(payload_RB: NDArray[np.uint8]) -> int:
    for row in range(payload_RB.shape[0]):
        if scale_bits(payload_RB[row]) >= SCALE_BOUND_BITS:  # a negative one too: its sign is the highest bit
            return row
    return NO_ROW


@native(read(types.uint16, 2), types.int64, types.uint16)
def check_16_bits(values_RD: NDArray[np.uint16], width: int, infinity: int) -> int:
    """fp16 and bf16: the magnitude's pattern must be below infinity's."""
    for row in range(values_RD.shape[0]):
        largest = np.uint16(0)
        for column in range(width):
            largest = max(largest, np.uint16(values_RD[row, column] & np.uint16(0x7FFF)))
        if largest >= infinity:
            return row
    return NO_ROW


@native(read(types.float32, 2), types.int64)
def check_32_bits(values_RD: NDArray[np.float32], width: int) -> int:
    bits_RD = values_RD.view(np.uint32)
    for row in range(values_RD.shape[0]):
        if max_magnitude(bits_RD[row, :width]) >= INFINITY:
            return row
    return NO_ROW


@native(read(types.uint8, 2), *ADD)
def add_int8(
    payload_RB: NDArray[np.uint8],
    weight_R: NDArray[np.float32],
    token_R: NDArray[np.int64],
    out_TD: NDArray[np.float32],
) -> int:
    """Decode, multiply, round, add, round, as all `add_` kernels, bit for bit what decoding first would give. Returns
    the first row whose token lies outside out_TD, or NO_ROW."""
    for row in range(payload_RB.shape[0]):
        token, weight, scale = token_R[row], weight_R[row], as_float(scale_bits(payload_RB[row]))
        if not 0 <= token < out_TD.shape[0]:
            return row
        value_D = payload_RB[row, SCALE_BYTES:].view(np.int8)
        for column in range(out_TD.shape[1]):
            out_TD[token, column] += np.float32(value_D[column]) * scale * weight
    return NO_ROW


@inlined
def as_it_is(value: Any) -> Any:
    return value


def _adding(dtype: Any, decode: Callable[[Any], Any]) -> Callable[..., int]:
    """`add_int8` for values that need no scale."""

    @native(read(dtype, 2), *ADD)
    def add(
        values_RD: NDArray[Any],
        weight_R: NDArray[np.float32],
        token_R: NDArray[np.int64],
        out_TD: NDArray[np.float32],
    ) -> int:
        for row in range(values_RD.shape[0]):
            token, weight = token_R[row], weight_R[row]
            if not 0 <= token < out_TD.shape[0]:
                return row
            for column in range(out_TD.shape[1]):
                out_TD[token, column] += decode(values_RD[row, column]) * weight
        return NO_ROW

    return add


add_fp16, add_bf16 = _adding(types.uint16, half_as_float), _adding(types.uint16, bfloat_as_float)
add_fp32 = _adding(types.float32, as_it_is)
