"""Weights of an expert as a torch CPU computes with them: int8 and int4 through torch's own packed kernels.

Both kernels take rows in bfloat16; with any other type of row they are 4 to 100 times slower. What they give is
widened to float32, in which bias, gate and activation are computed. The matrices must be filled up to whole groups, as
`stored_formats` stores them: the int8 kernel reads past the end of one that is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch.nn import functional as F  # noqa: N812 - as torch's own documentation writes it

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import Weights
from testbed.checkpoint.stored_formats import FLOAT_NAMES, SCALE_NAMES

PACKED_DTYPE = torch.bfloat16  # of the rows that packed kernels take
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS_PACKED_TOGETHER = 256  # a multiple of every kernel's block, so that pieces put together are the whole
INT4_OUTPUTS = 16  # the CPU's int4 kernel takes a multiple of so many


class PackedMatrix(ABC):
    """A matrix [out, in] that only its kernel can read."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> None:
        self._outputs, self._inputs = shape
        self._filled = 0  # set by `_pack`: inputs as the kernel takes them
        self._pack(values, scales)

    @abstractmethod
    def _pack(self, values: torch.Tensor, scales: torch.Tensor) -> None: ...

    @abstractmethod
    def _product(self, x_RI: torch.Tensor) -> torch.Tensor: ...

    def times(self, x_RI: torch.Tensor) -> torch.Tensor:
        """x_RI times the transposed matrix, in float32 [rows, out]."""
        x_RI = F.pad(x_RI.to(PACKED_DTYPE), (0, self._filled - self._inputs))
        return self._product(x_RI.contiguous())[:, : self._outputs].float()


class Int8Matrix(PackedMatrix):
    def _pack(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._filled = values.shape[1]
        self._q_OI, self._scale_O = values.clone(), scales.to(PACKED_DTYPE)

    def _product(self, x_RI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch._weight_int8pack_mm(x_RI, self._q_OI, self._scale_O)
        return product


class Int4Matrix(PackedMatrix):
    def _pack(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._filled, self._group = 2 * values.shape[1], 2 * values.shape[1] // scales.shape[1]
        missing = -len(values) % INT4_OUTPUTS
        self._packed = torch.empty(len(values) + missing, values.shape[1], dtype=torch.uint8)
        for start in range(0, len(self._packed), ROWS_PACKED_TOGETHER):
            piece = values[start : start + ROWS_PACKED_TOGETHER]
            steps_OI = torch.stack([piece >> 4, piece & 15], -1).flatten(1).int()
            end = min(start + ROWS_PACKED_TOGETHER, len(self._packed))
            steps_OI = F.pad(steps_OI, (0, 0, 0, end - start - len(piece)))
            self._packed[start:end] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps_OI, 1)
        self._scale_zero_GO2 = F.pad(scales, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()

    def _product(self, x_RI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_RI, self._packed, self._group, self._scale_zero_GO2
        )
        return product


CPU_MATRICES: dict[str, type[PackedMatrix]] = {"int8": Int8Matrix, "int4": Int4Matrix}


def compute_dtype(fmt: str, dtype: str) -> torch.dtype:
    """What rows are computed in: the kernels' own for int8 and int4, else what was asked for."""
    return FLOAT_DTYPES[dtype] if fmt in FLOAT_NAMES else PACKED_DTYPE


def hold_expert(
    stored: Mapping[str, torch.Tensor],
    spec: FfnSpec,
    fmt: str,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    matrices: Mapping[str, type[PackedMatrix]] = CPU_MATRICES,
) -> Weights:
    """One expert as `ffn_torch` computes with it, from what a shard stores; copied, into memory that torch aligned.

    dtype: of the weights, for the float formats. device: the CPU where none is named; `matrices` are those of its kind.
    """
    if fmt in FLOAT_NAMES:
        return {part: stored[part].to(device, dtype, copy=True) for part in spec.shapes()}
    weights: dict[str, torch.Tensor | PackedMatrix] = {}
    for part, shape in spec.shapes().items():
        values = stored[part].to(device)
        if len(shape) == 1:
            weights[part] = values.clone()
        else:
            scales = stored[f"{part}_{SCALE_NAMES[fmt]}"].to(device)
            weights[part] = matrices[fmt](values, scales, (shape[0], shape[1]))
    return weights
