"""How an expert's weights lie in a shard, format by format. Needs no torch: placement plans with it, a node decodes.

    float32, float16, bfloat16   every tensor of `FfnSpec.shapes` in that type
    int8    matrix I8 [out, in'], MATRIX_scale F32 [out]:              w = q * scale
    int4    matrix U8 [out, in' / 2], MATRIX_scale_zero BF16 [out, groups, 2]: w = (q - 8) * scale + zero

in' is `in` filled up to whole groups: torch's kernels read whole groups of 32 and run past the end of what is not one.
An even column of int4 is the high half of its byte. Scales are numbers of bfloat16 also where they are stored in
float32, so that no kernel rounds them; biases are F32. Every tensor begins at a multiple of four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from testbed.checkpoint.ffn import FfnSpec
from testbed.errors import CheckpointError

WeightFormat = Literal["float32", "float16", "bfloat16", "int8", "int4"]
FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
ComputesOn = Literal["gpu", "cpu", "numpy"]  # torch on a GPU, torch on a CPU, or no torch
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
SCALE_NAMES = {"int8": "scale", "int4": "scale_zero"}
ROWS_AT_ONCE = 64
GROUP = 32  # inputs that share a scale in int4: the smallest that torch's kernels know, and no slower on a CPU than 128

Float32 = NDArray[np.float32]


class Stored(NamedTuple):
    """Shape and type of a tensor in a shard, the type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


def check_format(fmt: str) -> None:
    """Raises CheckpointError for a format that is none of FORMATS."""
    if fmt not in FORMATS:
        raise CheckpointError(f"weight format {fmt!r}: use one of {', '.join(FORMATS)}")


def held_format(fmt: str, computes_on: ComputesOn) -> str:
    """How a node holds a shard's weights in memory if nobody says otherwise.

    As they are stored, but for a CPU, where float16 and bfloat16 are slower than float32 from a few rows on, and for
    numpy, which computes in float32 alone.
    """
    as_stored = computes_on == "gpu" or (computes_on == "cpu" and fmt not in FLOAT_NAMES)
    return fmt if as_stored else "float32"


def filled(inputs: int) -> int:
    """in': `inputs` filled up to whole groups."""
    return -(-inputs // GROUP) * GROUP


def stored_tensors(spec: FfnSpec, fmt: str) -> dict[str, Stored]:
    """Name -> shape and type of what a shard holds of one expert, in the order in which it is stored.

    Raises CheckpointError for an unknown format.
    """
    check_format(fmt)
    if fmt in FLOAT_NAMES:
        return {part: Stored(shape, FLOAT_NAMES[fmt]) for part, shape in spec.shapes().items()}
    stored: dict[str, Stored] = {}
    for part, shape in spec.shapes().items():
        if len(shape) == 1:
            stored[part] = Stored(shape, "F32")
        elif fmt == "int8":
            stored[part] = Stored((shape[0], filled(shape[1])), "I8")
            stored[f"{part}_scale"] = Stored(shape[:1], "F32")
        else:
            width = filled(shape[1])
            stored[part] = Stored((shape[0], width // 2), "U8")
            stored[f"{part}_scale_zero"] = Stored((shape[0], width // GROUP, 2), "BF16")
    return stored


def expert_bytes(spec: FfnSpec, fmt: str) -> int:
    """Bytes of one expert in a shard, and in the memory of a node that holds it in this format (`held_format`)."""
    return sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in stored_tensors(spec, fmt).values())


def format_of(manifest: Any, device: str) -> str:
    """The format of a device's shard: the manifest's `weight_format`, for all or by device, else its `dtype`."""
    said = getattr(manifest, "weight_format", None)
    if isinstance(said, Mapping):
        said = said.get(device)
    fmt: str = manifest.dtype if said is None else said
    return fmt


def decoded(stored: Mapping[str, NDArray[Any]], spec: FfnSpec, fmt: str) -> dict[str, Float32]:
    """The float32 tensors of `spec.shapes`, copied from what a shard holds, bfloat16 given as its bits in uint16."""
    weights = {}
    for part, shape in spec.shapes().items():
        weights[part] = np.empty(shape, np.float32)
        scales = stored.get(f"{part}_{SCALE_NAMES[fmt]}") if fmt in SCALE_NAMES else None
        for start in range(0, shape[0], ROWS_AT_ONCE):  # beside the result no more memory than a few rows
            rows = slice(start, start + ROWS_AT_ONCE)
            array = stored[part][rows]
            if scales is not None:
                array = (_from_int8 if fmt == "int8" else _from_int4)(array, scales[rows])[:, : shape[1]]
            weights[part][rows] = _widened(array)
    return weights


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _from_int8(q_OI: NDArray[np.int8], scale_O: Float32) -> Float32:
    weights: Float32 = q_OI * scale_O[:, None]
    return weights


def _from_int4(bytes_OB: NDArray[np.uint8], scale_zero_OG2: NDArray[Any]) -> Float32:
    scale_zero_OG2 = _widened(scale_zero_OG2)
    outputs, groups, _ = scale_zero_OG2.shape
    q_OI = np.stack([bytes_OB >> 4, bytes_OB & 15], -1).reshape(outputs, -1)
    q_OGI = q_OI.reshape(outputs, groups, -1).astype(np.float32) - 8
    weights: Float32 = q_OGI * scale_zero_OG2[:, :, :1] + scale_zero_OG2[:, :, 1:]
    return weights.reshape(outputs, -1)
