"""The compiled loops of the row codec; those of rows that stay encoded are in `reply_kernels.py`.

Every kernel works row by row, so that a second look finds the row still in the cache, keeps no temporary and lets go
of the interpreter lock. It returns the first row that it refuses, or NO_ROW.

Bit patterns stand for magnitudes: with the sign bit cleared they grow with the value, an infinity comes after every
number and a NaN after infinity. So one integer maximum, which vectorises where a maximum of floats would not, is both
the maximum and the check.

No fastmath flag is set: the only reductions are over integers, and on floats each flag could change a result
(`contract` would fuse a multiplication and an addition, `reassoc` and `arcp` would round otherwise than the
definition, `nnan` and `ninf` would allow the checks to be removed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_ROW = -1
SCALE_BYTES = 4  # before the values of an int8 row: its scale, a little-endian float32
SMALLEST_MAX = np.float32(127 * 2.0**-126)  # of a row in int8: below it, the scale would be subnormal
SCALE_BOUND_BITS = np.uint32(0x7C00_0000)  # 2**121: from there on, -128 * scale overflows
MAGNITUDE = np.uint32(0x7FFF_FFFF)
INFINITY = np.uint32(0x7F80_0000)
HALF_SMALLEST_NORMAL = np.uint32(0x3880_0000)  # 2**-14
HALF_INFINITY, BFLOAT_INFINITY = 0x7C00, 0x7F80
HALF_REBIAS = np.uint32((127 - 15) << 23)


@inlined
def as_float(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@inlined
def as_bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@inlined
def max_magnitude(bits_D: Any) -> Any:
    largest = np.uint32(0)
    for column in range(bits_D.size):
        largest = max(largest, np.uint32(bits_D[column] & MAGNITUDE))
    return largest


@native(read(types.float32, 2), types.float64, write(types.uint8, 2))
def encode_int8(hidden_RD: NDArray[np.float32], largest: float, out_RB: NDArray[np.uint8]) -> int:
    bits_RD = hidden_RD.view(np.uint32)
    for row in range(hidden_RD.shape[0]):
        max_bits = max_magnitude(bits_RD[row])
        if max_bits > as_bits(largest):
            return row
        row_max = as_float(max_bits)
        steps, scale = np.float32(0), np.float32(0)
        if row_max >= SMALLEST_MAX:
            steps, scale = np.float32(127) / row_max, row_max / np.float32(127)
        for byte in range(SCALE_BYTES):
            out_RB[row, byte] = np.uint8(as_bits(scale) >> np.uint32(8 * byte))
        value_D = out_RB[row, SCALE_BYTES:].view(np.int8)
        for column in range(hidden_RD.shape[1]):
            value_D[column] = np.int8(np.rint(hidden_RD[row, column] * steps))
    return NO_ROW


@native(read(types.float32, 2), types.float64, write(types.uint16, 2))
def encode_fp16(hidden_RD: NDArray[np.float32], largest: float, values_RD: NDArray[np.uint16]) -> int:
    """Round to nearest even by the addition that does so in the unit of the result's last place."""
    bits_RD = hidden_RD.view(np.uint32)
    for row in range(hidden_RD.shape[0]):
        if max_magnitude(bits_RD[row]) > as_bits(largest):
            return row
        for column in range(hidden_RD.shape[1]):
            magnitude = np.uint32(bits_RD[row, column] & MAGNITUDE)
            sign = np.uint32(np.uint32(bits_RD[row, column] >> np.uint32(16)) & np.uint32(0x8000))
            odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
            normal = np.uint32(np.uint32(magnitude - HALF_REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13))
            subnormal = np.uint32(as_bits(as_float(magnitude) + np.float32(0.5)) - as_bits(np.float32(0.5)))
            half = subnormal if magnitude < HALF_SMALLEST_NORMAL else normal
            values_RD[row, column] = np.uint16(sign | half)
    return NO_ROW


@native(read(types.float32, 2), types.float64, write(types.uint16, 2))
def encode_bf16(hidden_RD: NDArray[np.float32], largest: float, values_RD: NDArray[np.uint16]) -> int:
    bits_RD = hidden_RD.view(np.uint32)
    for row in range(hidden_RD.shape[0]):
        if max_magnitude(bits_RD[row]) > as_bits(largest):
            return row
        for column in range(hidden_RD.shape[1]):
            bits = bits_RD[row, column]
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            values_RD[row, column] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return NO_ROW


@native(read(types.float32, 2), types.float64)
def check_fp32(hidden_RD: NDArray[np.float32], largest: float) -> int:
    bits_RD = hidden_RD.view(np.uint32)
    for row in range(hidden_RD.shape[0]):
        if max_magnitude(bits_RD[row]) > as_bits(largest):
            return row
    return NO_ROW


@native(read(types.float32, 2), types.float64, write(types.float32, 2))
def encode_fp32(hidden_RD: NDArray[np.float32], largest: float, out_RD: NDArray[np.float32]) -> int:
    bits_RD = hidden_RD.view(np.uint32)
    for row in range(hidden_RD.shape[0]):
        if max_magnitude(bits_RD[row]) > as_bits(largest):
            return row
        for column in range(hidden_RD.shape[1]):
            out_RD[row, column] = hidden_RD[row, column]
    return NO_ROW


@inlined
def scale_bits(row_B: Any) -> Any:
    bits = np.uint32(0)
    for byte in range(SCALE_BYTES):
        bits = np.uint32(bits | np.uint32(np.uint32(row_B[byte]) << np.uint32(8 * byte)))
    return bits


@inlined
def half_as_float(half: Any) -> Any:
    """Multiplying by 2**112 moves the exponent's bias from 15 to 127, exactly, for subnormal halves too."""
    bits = np.uint32(half)
    value = as_float(np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
    return as_float(np.uint32(as_bits(value) | sign))


@inlined
def bfloat_as_float(bfloat: Any) -> Any:
    return as_float(np.uint32(np.uint32(bfloat) << np.uint32(16)))


@native(read(types.uint8, 2), write(types.float32, 2))
def decode_int8(payload_RB: NDArray[np.uint8], out_RD: NDArray[np.float32]) -> int:
    for row in range(payload_RB.shape[0]):
        bits = scale_bits(payload_RB[row])
        if bits >= SCALE_BOUND_BITS:
            return row
        value_D = payload_RB[row, SCALE_BYTES:].view(np.int8)
        for column in range(out_RD.shape[1]):
            out_RD[row, column] = np.float32(value_D[column]) * as_float(bits)
    return NO_ROW


@native(read(types.uint16, 2), write(types.float32, 2))
def decode_fp16(values_RD: NDArray[np.uint16], out_RD: NDArray[np.float32]) -> int:
    for row in range(values_RD.shape[0]):
        largest = np.uint32(0)
        for column in range(out_RD.shape[1]):
            largest = max(largest, np.uint32(np.uint32(values_RD[row, column]) & np.uint32(0x7FFF)))
            out_RD[row, column] = half_as_float(values_RD[row, column])
        if largest >= HALF_INFINITY:
            return row
    return NO_ROW


@native(read(types.uint16, 2), write(types.float32, 2))
def decode_bf16(values_RD: NDArray[np.uint16], out_RD: NDArray[np.float32]) -> int:
    for row in range(values_RD.shape[0]):
        largest = np.uint32(0)
        for column in range(out_RD.shape[1]):
            value = bfloat_as_float(values_RD[row, column])
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
            out_RD[row, column] = value
        if largest >= INFINITY:
            return row
    return NO_ROW


@native(read(types.float32, 2), write(types.float32, 2))
def decode_fp32(values_RD: NDArray[np.float32], out_RD: NDArray[np.float32]) -> int:
    for row in range(values_RD.shape[0]):
        largest = np.uint32(0)
        for column in range(out_RD.shape[1]):
            value = values_RD[row, column]
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
            out_RD[row, column] = value
        if largest >= INFINITY:
            return row
    return NO_ROW
