"""Encodes an expert's weights in the formats of `stored_formats`, in torch and a few rows at a time.

int8 has a scale per output, int4 a scale and a zero per output and group of inputs; both round to the nearest value.
No calibration data are needed and none are used: what a format costs is measured, `format_costs` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn import functional as F  # noqa: N812 - as torch's own documentation writes it

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.stored_formats import (
    FLOAT_NAMES,
    FORMATS,
    GROUP,
    WeightFormat,
    expert_bytes,
    filled,
    stored_tensors,
)
from testbed.errors import CheckpointError

__all__ = ["FORMATS", "WeightFormat", "encode_expert", "encoded_shapes", "expert_bytes"]

ROWS_AT_ONCE = 64  # what is encoded together: a block stays in the cache, and memory beside source and result small
TORCH_DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I8": torch.int8, "U8": torch.uint8},
}
UP = 1 + 2**-8  # half a step of bfloat16: a scale rounded to it still reaches the largest weight

Tensors = Mapping[str, torch.Tensor]
Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def encoded_shapes(spec: FfnSpec, fmt: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of what `encode_expert` gives, in its order. Raises CheckpointError, as that does."""
    return {name: (tensor.shape, TORCH_DTYPES[tensor.dtype]) for name, tensor in stored_tensors(spec, fmt).items()}


@torch.inference_mode()
def encode_expert(tensors: Tensors, fmt: str, spec: FfnSpec) -> dict[str, torch.Tensor]:
    """One expert, its tensors named and shaped as `spec.shapes()` says and of any float dtype, as a shard stores it.

    Raises CheckpointError for an unknown format, and for values that are not finite or that the format cannot hold.
    """
    wanted = encoded_shapes(spec, fmt)
    encoded: dict[str, torch.Tensor] = {}
    for part, shape in spec.shapes().items():
        tensor = tensors[part]
        if fmt in FLOAT_NAMES or len(shape) == 1:
            encoded[part] = _cast(part, tensor, wanted[part][1])
        elif fmt == "int8":
            encoded[part], encoded[f"{part}_scale"] = _matrix(part, tensor, _to_int8)
        else:
            encoded[part], encoded[f"{part}_scale_zero"] = _matrix(part, tensor, _to_int4)
    return encoded


def _cast(part: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not cast.isfinite().all():
        raise CheckpointError(f"{part}: values too large for {dtype}, or not finite; choose another weight format")
    return cast


def _matrix(part: str, weight_OI: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    pieces = [encoder(rows) for rows in _filled_rows(part, weight_OI)]
    values, scales = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(scales)


def _filled_rows(part: str, weight_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    inputs = weight_OI.shape[1]
    for start in range(0, len(weight_OI), ROWS_AT_ONCE):
        wide_OI = weight_OI[start : start + ROWS_AT_ONCE].to(torch.float32, copy=True)  # the encoders work in place
        if not wide_OI.isfinite().all():
            raise CheckpointError(f"{part}: a weight is not finite; the checkpoint is damaged, download it again")
        yield F.pad(wide_OI, (0, filled(inputs) - inputs)).view(len(wide_OI), -1, GROUP)


def _to_int8(weight_OGI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight_OI = weight_OGI.flatten(1)
    scale_O = _scale(weight_OI.abs().amax(1) / 127)
    return weight_OI.div_(_divisor(scale_O)[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O


def _to_int4(weight_OGI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low_OG, high_OG = weight_OGI.aminmax(dim=2)
    scale_OG = _scale(high_OG / 15 - low_OG / 15)
    zero_OG = (low_OG / 2 + high_OG / 2 + scale_OG / 2).bfloat16()  # in the middle of q - 8 = -8 to 7
    steps_OGI = weight_OGI.sub_(zero_OG.float()[..., None]).div_(_divisor(scale_OG)[..., None])
    q_OI = steps_OGI.round_().add_(8).clamp_(0, 15).flatten(1).to(torch.uint8)
    return (q_OI[:, ::2] << 4) | q_OI[:, 1::2], torch.stack([scale_OG.bfloat16(), zero_OG], -1)


def _scale(step: torch.Tensor) -> torch.Tensor:
    """The step as a number of bfloat16."""
    return (step * UP).bfloat16().float()


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """A scale is 0 where all weights are equal: any step then decodes to them."""
    return torch.where(scale > 0, scale, 1.0)
