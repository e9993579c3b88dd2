"""Quantised checkpoints: a split stores what their numbers mean. transformers dequantises; here is what it overlooks.

It takes the size of a block from the grid of scales, which is wrong where the last block is cut short (DeepSeek-V3: 576
rows in blocks of 128), and lets a weight through as it is where its scale is missing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from testbed.checkpoint.families import DTYPES, read_config
from testbed.errors import CheckpointError

SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)  # numbers that mean nothing without a scale
SCALE_SUFFIX = "_scale_inv"  # of the pattern of a scale, after that of its weight


class Dequantiser:
    """How a checkpoint is quantised, if it is. Raises CheckpointError for a method that cannot be undone."""

    def __init__(self, directory: Path) -> None:
        config = read_config(directory)
        self._directory = directory
        self.quantizer = _quantizer(directory, getattr(config, "quantization_config", None))
        block = getattr(getattr(self.quantizer, "quantization_config", None), "weight_block_size", None)
        self._block: tuple[int, int] | None = tuple(block) if block else None  # rows and columns that share a scale
        # as `from_pretrained` would have it: FP8 and MXFP4 do not say themselves what they were before
        self._dtype = config.dtype if config.dtype in DTYPES.values() else torch.bfloat16

    def check_scale(self, key: str, pattern: str | None, dtype: torch.dtype, patterns: set[Any]) -> None:
        """`patterns` are those of everything that is converted together. Raises CheckpointError for a missing scale."""
        if dtype in SCALED_DTYPES and f"{pattern}{SCALE_SUFFIX}" not in patterns:
            raise CheckpointError(
                f"{self._directory}: {key} is stored as {str(dtype).removeprefix('torch.')} and there is no scale for "
                "it; download the model again, or use one in bf16"
            )

    def whole_blocks(self, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The scales of a weight of this shape, one for each number of it where blocks do not divide it evenly."""
        if self._block is None or len(shape) < 2:
            return scale
        sizes = list(zip(shape[-2:], self._block, strict=True))
        if list(scale.shape[-2:]) != [math.ceil(size / block) for size, block in sizes]:
            return scale
        if all(size % block == 0 for size, block in sizes):
            return scale
        rows, columns = [torch.arange(size) // block for size, block in sizes]
        return scale[..., rows[:, None], columns]

    def stored(self, tensor: torch.Tensor, sources: list[torch.dtype]) -> torch.Tensor:
        """What came out of a conversion; in the dtype that the config names where its sources were quantised."""
        return tensor.to(self._dtype) if any(dtype.itemsize == 1 for dtype in sources) else tensor


def _quantizer(directory: Path, quantised: Any) -> Any:
    if quantised is None:
        return None
    method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised.quant_method
    try:
        quantizer = AutoHfQuantizer.from_config(quantised, pre_quantized=True)
    except (ValueError, ImportError, NotImplementedError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: quantised with {method}: {error!s:.120}; use one in bf16") from error
    if not hasattr(quantizer.quantization_config, "dequantize"):
        raise CheckpointError(f"{directory}: quantised with {method}, which cannot be dequantised; use one in bf16")
    quantizer.quantization_config.dequantize = True
    return quantizer
