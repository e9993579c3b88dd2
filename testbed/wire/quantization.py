"""Token embeddings as bytes, and back: quantise a block once, send each node its rows, dequantise, add up.

A payload of R rows is one raw frame: row after row, little-endian, each its D values and in int8 a float32 scale before
them, so that any run of rows is a slice. With x the input, x' what the other side decodes and |.| magnitudes:

    int8   one scale per row, max|x| / 127; values rint(x * (127 / max|x|)), half to even, within [-127, 127]:
               |x - x'| <= scale * (1/2 + 2**-15)
           where 1/2 is the rounding to whole steps and 2**-15 covers the four float32 roundings on the way. A row with
           max|x| < 127 * 2**-126 (1.5e-36), whose scale would be subnormal, travels as zeros: |x - x'| = |x|.
    fp16   to nearest, half to even: |x - x'| <= max(2**-11 * |x|, 2**-25)
    bf16   to nearest, half to even: |x - x'| <= max(2**-8 * |x|, 2**-134)
    fp32   x' = x, bit for bit

What a scheme cannot carry (`Scheme.largest`), a NaN or an infinity is refused on both sides, never clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from testbed.errors import ConfigError, MessageError
from testbed.wire import kernels, reply_kernels
from testbed.wire.kept import KeptRows
from testbed.wire.kernels import SCALE_BYTES

SchemeName = Literal["int8", "fp16", "bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one value travels."""

    name: SchemeName
    bytes_per_value: int
    largest: float  # magnitude that it carries
    has_scales: bool = False

    def row_bytes(self, width: int) -> int:
        """Bytes of one row, its scale included."""
        return width * self.bytes_per_value + (SCALE_BYTES if self.has_scales else 0)

    def payload_bytes(self, rows: int, width: int) -> int:
        return rows * self.row_bytes(width)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme("int8", 1, 2.0**127, has_scales=True),
        "fp16": Scheme("fp16", 2, 65504.0),
        "bf16": Scheme("bf16", 2, 2.0**128 - 2.0**120),
        "fp32": Scheme("fp32", 4, 2.0**128 - 2.0**104),
    }
)


def scheme_named(name: str) -> Scheme:
    """The scheme of this name, as the run file gives it. Raises ConfigError."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise ConfigError(f"unknown quantisation scheme {name!r}: choose one of {', '.join(SCHEMES)}") from None


def quantise(
    hidden_TD: NDArray[np.float32], scheme: Scheme, room: KeptRows[np.uint8] | None = None, padded_width: int = 0
) -> NDArray[np.uint8]:
    """A C-contiguous block as it will travel: rows_TB, written into `room` if given.

    Rows are filled up to `padded_width` values. fp32 that need not be is passed on without a copy. Raises
    MessageError, naming the row, at a NaN, an infinity or a magnitude above `scheme.largest`.
    """
    rows, width = hidden_TD.shape
    if scheme.name == "fp32" and padded_width <= width:
        rows_TB = hidden_TD.view(np.uint8)
    else:
        rows_TB = (room or KeptRows(np.uint8)).take(rows, scheme.row_bytes(max(width, padded_width)))
    refused = _encode(hidden_TD, scheme, rows_TB)
    if refused != kernels.NO_ROW:
        raise MessageError(
            f"row {refused} of {rows} to send has a NaN or a magnitude above {scheme.largest:g}, which {scheme.name} "
            "cannot carry: check the layer that computed it, or choose another scheme"
        )
    return rows_TB


def _encode(hidden_TD: NDArray[np.float32], scheme: Scheme, out_TB: NDArray[np.uint8]) -> int:
    """The first row that is refused, or NO_ROW."""
    if scheme.name == "int8":
        return kernels.encode_int8(hidden_TD, scheme.largest, out_TB)
    if scheme.name == "fp16":
        return kernels.encode_fp16(hidden_TD, scheme.largest, out_TB.view(np.uint16))
    if scheme.name == "bf16":
        return kernels.encode_bf16(hidden_TD, scheme.largest, out_TB.view(np.uint16))
    if out_TB.shape[1] == hidden_TD.shape[1] * scheme.bytes_per_value:
        return kernels.check_fp32(hidden_TD, scheme.largest)
    return kernels.encode_fp32(hidden_TD, scheme.largest, out_TB.view(np.float32))


def dequantise(
    payload: bytes | memoryview,
    rows: int,
    width: int,
    scheme: Scheme,
    out_RD: NDArray[np.float32],
    padded_width: int = 0,
) -> None:
    """Decode a payload, at any address and read-only or not, into `out_RD` (rows x width, C-contiguous).

    Its rows may have been filled up to `padded_width` values. Raises MessageError if its length
    differs, a scale is negative, not finite or would overflow, or a value is not finite; `out_RD` is then partly
    written. Raises ValueError if `out_RD` has another shape.
    """
    encoded_R = _as_rows(payload, rows, max(width, padded_width), scheme)
    if out_RD.shape != (rows, width):
        raise ValueError(f"{rows} rows of width {width} do not fit an array of shape {out_RD.shape}")
    refused = _DECODE[scheme.name](encoded_R, out_RD)
    if refused != kernels.NO_ROW:
        raise _refusal(refused, rows, scheme)


def received(payload: bytes | memoryview, rows: int, width: int, scheme: Scheme, padded_width: int = 0) -> NDArray[Any]:
    """A payload as rows of what travels, not decoded and not copied. Raises MessageError as `dequantise` does."""
    encoded_R = _as_rows(payload, rows, max(width, padded_width), scheme)
    if scheme.name == "int8":
        refused = reply_kernels.check_int8(encoded_R)
    elif scheme.name == "fp32":
        refused = reply_kernels.check_32_bits(encoded_R, width)
    else:
        infinity = kernels.HALF_INFINITY if scheme.name == "fp16" else kernels.BFLOAT_INFINITY
        refused = reply_kernels.check_16_bits(encoded_R, width, infinity)
    if refused != kernels.NO_ROW:
        raise _refusal(refused, rows, scheme)
    return encoded_R


def _refusal(row: int, rows: int, scheme: Scheme) -> MessageError:
    wrong = "a scale out of range" if scheme.has_scales else "a value that is not finite"
    return MessageError(f"{scheme.name} payload has {wrong} in row {row} of {rows}")


def _as_rows(payload: bytes | memoryview, rows: int, on_wire: int, scheme: Scheme) -> NDArray[Any]:
    row_bytes, dtype = scheme.row_bytes(on_wire), _DTYPE_OF[scheme.name]
    if len(payload) != rows * row_bytes:
        raise MessageError(
            f"payload of {len(payload)} bytes cannot be {rows} {scheme.name} rows of width {on_wire}, which take "
            f"{rows * row_bytes}"
        )
    return np.ndarray((rows, row_bytes // dtype.itemsize), dtype, payload)


_DTYPE_OF = {name: np.dtype(kind) for name, kind in (("int8", "u1"), ("fp16", "<u2"), ("bf16", "<u2"), ("fp32", "<f4"))}
_DECODE: Mapping[str, Callable[..., int]] = {
    "int8": kernels.decode_int8,
    "fp16": kernels.decode_fp16,
    "bf16": kernels.decode_bf16,
    "fp32": kernels.decode_fp32,
}
_ADD: Mapping[str, Callable[..., int]] = {
    "int8": reply_kernels.add_int8,
    "fp16": reply_kernels.add_fp16,
    "bf16": reply_kernels.add_bf16,
    "fp32": reply_kernels.add_fp32,
}


def accumulate(
    encoded_R: NDArray[Any],
    weight_R: NDArray[np.float32],
    token_R: NDArray[np.int64],
    out_TD: NDArray[np.float32],
    scheme: Scheme = SCHEMES["fp32"],
) -> None:
    """Add weight_R * y_RD to rows token_R of `out_TD` (Eq. 1), row after row in the order given.

    encoded_R is y_RD itself, or as `received` has it. Decodes, multiplies, rounds, adds, rounds: bitwise
    `out.index_add_(0, token, y * weight[:, None])` of torch in float32. Raises ValueError if shapes differ, IndexError
    if a token lies outside `out_TD`.
    """
    rows = len(encoded_R)
    too_narrow = encoded_R.shape[1] * encoded_R.itemsize < scheme.row_bytes(out_TD.shape[1])
    if weight_R.shape != (rows,) or token_R.shape != (rows,) or too_narrow:
        shapes = f"{encoded_R.shape}, {weight_R.shape}, {token_R.shape}, {out_TD.shape}"
        raise ValueError(f"shapes of rows, weights, tokens and output do not belong together: {shapes}")
    wrong = _ADD[scheme.name](encoded_R, weight_R, token_R, out_TD)
    if wrong != kernels.NO_ROW:
        raise IndexError(f"token {token_R[wrong]} lies outside the block's {len(out_TD)}")
