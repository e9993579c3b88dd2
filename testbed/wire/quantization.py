"""Token embeddings as bytes, and back: quantise a block once, pack the rows of each node, unpack, add up.

A payload of R rows of width D is one raw frame, little-endian: in int8 R float32 scales, then R x D values; in the
other schemes R x D values alone. With x the input, x' what the other side decodes and |.| magnitudes:

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

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.errors import ConfigError, MessageError
from testbed.wire import kernels

SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one value travels."""

    name: str
    dtype: np.dtype[Any]  # of the values as stored; bf16 has no numpy type and is kept as its bits
    largest: float  # magnitude that it carries
    has_scales: bool = False

    @property
    def bytes_per_value(self) -> int:
        return self.dtype.itemsize

    def row_bytes(self, width: int) -> int:
        """Bytes of one row, its scale included."""
        return width * self.bytes_per_value + (SCALE_BYTES if self.has_scales else 0)

    def payload_bytes(self, rows: int, width: int) -> int:
        return rows * self.row_bytes(width)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme("int8", np.dtype(np.int8), 2.0**127, has_scales=True),
        "fp16": Scheme("fp16", np.dtype(np.float16), 65504.0),
        "bf16": Scheme("bf16", np.dtype(np.uint16), 2.0**128 - 2.0**120),
        "fp32": Scheme("fp32", np.dtype(np.float32), 2.0**128 - 2.0**104),
    }
)


def scheme_named(name: str) -> Scheme:
    """The scheme of this name, as the run file gives it. Raises ConfigError."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise ConfigError(f"unknown quantisation scheme {name!r}: choose one of {', '.join(SCHEMES)}") from None


@dataclass(frozen=True, slots=True)
class Quantised:
    """A block of T rows as it will travel. Made with Buffers, it is valid until they are used again."""

    scheme: Scheme
    values_TD: NDArray[Any]  # of scheme.dtype
    scale_T: NDArray[np.float32] | None = None

    @property
    def values_TB(self) -> NDArray[np.uint8]:
        """The rows as bytes."""
        return self.values_TD.view(np.uint8)

    @property
    def scale_TB(self) -> NDArray[np.uint8]:
        """The scales as bytes, 0 of them where the scheme has none."""
        if self.scale_T is None:
            return np.empty((len(self.values_TD), 0), np.uint8)
        return self.scale_T.view(np.uint8).reshape(-1, SCALE_BYTES)


class Buffers:
    """Memory that `quantise` writes into again and again. It grows to the largest block that it has seen."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.uint8)
        self._scales = np.empty(0, np.float32)

    def values(self, rows: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        size_bytes = rows * width * dtype.itemsize
        if self._values.size < size_bytes:
            self._values = np.empty(size_bytes, np.uint8)
        return self._values[:size_bytes].view(dtype).reshape(rows, width)

    def scales(self, rows: int) -> NDArray[np.float32]:
        if self._scales.size < rows:
            self._scales = np.empty(rows, np.float32)
        return self._scales[:rows]


def quantise(hidden_TD: NDArray[np.float32], scheme: Scheme, out: Buffers | None = None) -> Quantised:
    """A C-contiguous block in the values of `scheme`, written into `out` if given; fp32 is passed on without a copy.

    Raises MessageError, naming the row, at a NaN, an infinity or a magnitude above `scheme.largest`.
    """
    memory = out or Buffers()
    rows, width = hidden_TD.shape
    values_TD = hidden_TD if scheme.name == "fp32" else memory.values(rows, width, scheme.dtype)
    quantised = Quantised(scheme, values_TD, memory.scales(rows) if scheme.has_scales else None)
    refused = _encode(hidden_TD, quantised)
    if refused != kernels.NO_ROW:
        raise MessageError(
            f"row {refused} of {rows} to send has a NaN or a magnitude above {scheme.largest:g}, which {scheme.name} "
            "cannot carry: check the layer that computed it, or choose another scheme"
        )
    return quantised


def _encode(hidden_TD: NDArray[np.float32], out: Quantised) -> int:
    """The first row that is refused, or NO_ROW."""
    largest = out.scheme.largest
    if out.scale_T is not None:
        return kernels.encode_int8(hidden_TD, largest, out.values_TD, out.scale_T)
    if out.scheme.name == "fp16":
        return kernels.encode_fp16(hidden_TD, largest, out.values_TD.view(np.uint16))
    if out.scheme.name == "bf16":
        return kernels.encode_bf16(hidden_TD, largest, out.values_TD)
    return kernels.check_fp32(hidden_TD, largest)


def pack(quantised: Quantised, row_index_R: NDArray[np.int64], out: NDArray[np.uint8] | memoryview) -> None:
    """Gather rows, in the order given, into the payload `out`: exactly `payload_bytes` of them, writable.

    Raises ValueError if `out` has another size, IndexError if an index names no row.
    """
    rows, payload_bytes = (
        row_index_R.size,
        quantised.scheme.payload_bytes(row_index_R.size, quantised.values_TD.shape[1]),
    )
    payload = np.frombuffer(out, np.uint8)
    if payload.size != payload_bytes:
        raise ValueError(f"{rows} rows take {payload_bytes} bytes, not the {payload.size} given")
    wrong = kernels.gather(quantised.scale_TB, quantised.values_TB, row_index_R, payload)
    if wrong != kernels.NO_ROW:
        raise IndexError(f"row {row_index_R[wrong]} is not one of the block's {len(quantised.values_TD)}")


def unpack(payload: bytes | memoryview, rows: int, width: int, scheme: Scheme, out_RD: NDArray[np.float32]) -> None:
    """Dequantise a payload, at any address and read-only or not, into `out_RD` (rows x width, C-contiguous).

    Raises MessageError if its length differs, a scale is negative, not finite or would overflow, or a value is not
    finite; `out_RD` is then partly written. Raises ValueError if `out_RD` has another shape.
    """
    payload = memoryview(payload)
    if payload.nbytes != scheme.payload_bytes(rows, width):
        raise MessageError(
            f"payload of {payload.nbytes} bytes cannot be {rows} {scheme.name} rows of width {width}, which take "
            f"{scheme.payload_bytes(rows, width)}"
        )
    if out_RD.shape != (rows, width):
        raise ValueError(f"{rows} rows of width {width} do not fit an array of shape {out_RD.shape}")
    refused = _decode(payload, scheme, out_RD)
    if refused != kernels.NO_ROW:
        wrong = "a scale out of range" if scheme.has_scales else "a value that is not finite"
        raise MessageError(f"{scheme.name} payload has {wrong} in row {refused} of {rows}")


def _decode(payload: memoryview, scheme: Scheme, out_RD: NDArray[np.float32]) -> int:
    """The first row that is refused, or NO_ROW."""
    rows = len(out_RD)
    scale_bytes = rows * SCALE_BYTES if scheme.has_scales else 0
    stored = np.dtype(np.uint16) if scheme.name == "fp16" else scheme.dtype
    values_RD = np.frombuffer(payload, stored, out_RD.size, scale_bytes).reshape(out_RD.shape)
    if scheme.name == "int8":
        return kernels.decode_int8(np.frombuffer(payload, np.float32, rows), values_RD, out_RD)
    if scheme.name == "fp16":
        return kernels.decode_fp16(values_RD, out_RD)
    if scheme.name == "bf16":
        return kernels.decode_bf16(values_RD, out_RD)
    return kernels.decode_fp32(values_RD, out_RD)


def accumulate(
    y_RD: NDArray[np.float32],
    weight_R: NDArray[np.float32],
    token_R: NDArray[np.int64],
    out_TD: NDArray[np.float32],
) -> None:
    """Add weight_R * y_RD to rows token_R of `out_TD` (Eq. 1), row after row in the order given.

    Multiplies, rounds, adds, rounds: bitwise `out.index_add_(0, token, y * weight[:, None])` of torch in float32.
    Raises ValueError if shapes differ, IndexError if a token lies outside `out_TD`.
    """
    rows, width = y_RD.shape
    if weight_R.shape != (rows,) or token_R.shape != (rows,) or out_TD.shape[1] != width:
        shapes = f"{y_RD.shape}, {weight_R.shape}, {token_R.shape}, {out_TD.shape}"
        raise ValueError(f"shapes of rows, weights, tokens and output do not belong together: {shapes}")
    wrong = kernels.add_weighted(y_RD, weight_R, token_R, out_TD)
    if wrong != kernels.NO_ROW:
        raise IndexError(f"token {token_R[wrong]} lies outside the block's {len(out_TD)}")
