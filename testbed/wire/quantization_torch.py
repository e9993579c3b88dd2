"""The row codec where the rows are: on a GPU, so that what crosses to the host is what travels, not what was computed.

Bit for bit the rows of `testbed.wire.quantization`, in plain torch operations. Compared on the CPU; not yet run on a
GPU.
"""

from __future__ import annotations

import torch

from testbed.wire.kernels import SCALE_BYTES, SMALLEST_MAX
from testbed.wire.quantization import Scheme

INT8_STEPS = 127.0
VALUES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def encode(hidden_TD: torch.Tensor, scheme: Scheme, padded_width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 hidden_TD as rows_TB (uint8), and refused_T (bool), on the device of hidden_TD. Waits for nothing.

    Rows are filled with zeros up to `padded_width` values. A row with a NaN, an infinity or a magnitude above
    `scheme.largest` is refused: its bytes mean nothing.
    """
    rows, width = hidden_TD.shape
    rows_TB = hidden_TD.new_zeros((rows, scheme.row_bytes(max(width, padded_width))), dtype=torch.uint8)
    max_T = hidden_TD.abs().amax(dim=1)  # NaN where the row has one, which no comparison finds small enough
    if scheme.name == "int8":
        _encode_int8(hidden_TD, max_T, rows_TB)
    else:
        rows_TB.view(VALUES[scheme.name])[:, :width].copy_(hidden_TD)
    return rows_TB, ~(max_T <= scheme.largest)


def _encode_int8(hidden_TD: torch.Tensor, max_T: torch.Tensor, rows_TB: torch.Tensor) -> None:
    # Quotients of two tensors: by a Python number, torch on a GPU multiplies with its reciprocal, which rounds twice.
    steps_in_127_T = torch.full_like(max_T, INT8_STEPS)
    carried_T, zero_T = max_T >= float(SMALLEST_MAX), torch.zeros_like(max_T)
    scale_T = torch.where(carried_T, torch.div(max_T, steps_in_127_T), zero_T)
    steps_T = torch.where(carried_T, torch.div(steps_in_127_T, max_T), zero_T)
    rows_TB[:, :SCALE_BYTES] = scale_T[:, None].view(torch.uint8)
    values_TD = rows_TB.view(torch.int8)[:, SCALE_BYTES : SCALE_BYTES + hidden_TD.shape[1]]
    values_TD.copy_((hidden_TD * steps_T[:, None]).round_())
