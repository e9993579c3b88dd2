"""Before a checkpoint is split: does the node's FFN give what the model's own class gives?"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch

from testbed.checkpoint.families import canonical
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import ffn_torch
from testbed.errors import CheckpointError

TOLERANCE = 1e-5  # relative to a row's largest value; bits are equal on the same machine in most cases
ROW_SCALES = (0.1, 1.0, 1.0, 10.0, 100.0)  # small, usual, and beyond the clamps of the families that clamp


@torch.inference_mode()
def check_layer(path: str, experts: Any, weights: Mapping[str, torch.Tensor], spec: FfnSpec) -> None:
    """Runs one expert (its parameters as the module names them) both ways. Raises CheckpointError if they differ."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    rows = torch.randn(len(ROW_SCALES), spec.width, generator=torch.Generator().manual_seed(0))
    x_RD = rows * torch.tensor(ROW_SCALES)[:, None]
    ours_RD = ffn_torch(x_RD, canonical(experts, weights), spec)
    model_RD = _with_one_expert(experts, weights)(
        x_RD, torch.zeros(len(x_RD), 1, dtype=torch.int64), torch.ones(len(x_RD), 1)
    )
    difference = ((ours_RD - model_RD).abs().amax(1) / model_RD.abs().amax(1).clamp(min=1e-30)).max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{path}: {type(experts).__name__} computes something else than down(act(gate) * up) "
            f"(relative difference {difference:.1e}); this family cannot run on nodes"
        )


def _with_one_expert(experts: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model's own module, holding one expert only, so that memory stays at one expert."""
    single = copy(experts)
    single.__dict__["_parameters"] = {
        name: torch.nn.Parameter(tensor[None], requires_grad=False) for name, tensor in weights.items()
    }
    single.num_experts = 1
    return single
