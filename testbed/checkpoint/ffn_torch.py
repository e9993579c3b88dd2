"""The expert FFN in torch: what nodes compute, and what a split is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional as F  # noqa: N812 - as torch's own documentation writes it

from testbed.checkpoint.ffn import FfnSpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Matrix(Protocol):
    """A matrix [out, in] in a form that F.linear does not read."""

    def times(self, x_RI: torch.Tensor) -> torch.Tensor:
        """x_RI times the transposed matrix."""


Weights = Mapping[str, Any]  # tensors by the names of `FfnSpec.shapes`; in place of a matrix a Matrix may stand


def ffn_torch(x_RD: torch.Tensor, weights: Weights, spec: FfnSpec) -> torch.Tensor:
    """One expert on R rows. Operation by operation what transformers' eager experts do, so that no bit differs."""
    inner_RI = _linear(x_RD, weights[spec.first])
    if spec.has_bias:
        inner_RI = inner_RI + weights[f"{spec.first}_bias"]
    inner_RI = _gated(inner_RI, spec) if spec.has_gate else ACTIVATIONS[spec.act](inner_RI)
    y_RD = _linear(inner_RI, weights["down"])
    return y_RD + weights["down_bias"] if spec.has_bias else y_RD


def _linear(x_RI: torch.Tensor, matrix: torch.Tensor | Matrix) -> torch.Tensor:
    return F.linear(x_RI, matrix) if isinstance(matrix, torch.Tensor) else matrix.times(x_RI)


def _gated(both: torch.Tensor, spec: FfnSpec) -> torch.Tensor:
    gate_RI, up_RI = both.chunk(2, -1)
    if spec.limit is not None:
        gate_RI, up_RI = gate_RI.clamp(max=spec.limit), up_RI.clamp(-spec.limit, spec.limit)
    if spec.alpha is not None:
        return (up_RI + 1) * (gate_RI * torch.sigmoid(gate_RI * spec.alpha))
    return ACTIVATIONS[spec.act](gate_RI) * up_RI
