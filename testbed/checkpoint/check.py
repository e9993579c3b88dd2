"""Before a checkpoint is split: does the node's FFN give what the model's own class gives?"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch

from testbed.checkpoint.families import canonical, expert_parameters
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import ffn_torch
from testbed.errors import CheckpointError

TOLERANCE = 1e-5  # relative to a row's largest value; bits are equal on the same machine in most cases
ROW_SCALES = (0.1, 1.0, 1.0, 10.0, 100.0)  # small, usual, and beyond the clamps of the families that clamp
MAX_INNER = 64  # what is compared is what the class does, and it does the same at any inner width


@torch.inference_mode()
def check_layer(path: str, experts: Any, spec: FfnSpec) -> None:
    """Runs an expert of random weights and the layer's row width both ways. Raises CheckpointError if they differ."""
    spec = spec.model_copy(update={"inner": min(spec.inner, MAX_INNER)})
    generator = torch.Generator().manual_seed(0)
    weights = _random_weights(experts, spec, generator)
    rows = torch.randn(len(ROW_SCALES), spec.width, generator=generator)
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


def _random_weights(experts: Any, spec: FfnSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Parameters of one expert under the names and in the form that the module gives them."""
    shapes = spec.shapes()
    weights = {}
    for name in expert_parameters(experts):
        shape = shapes[name.replace("_proj", "")]
        if experts.is_transposed:
            shape = shape[::-1]
        weights[name] = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else spec.width**-0.5)
    return weights


def _with_one_expert(experts: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model's own module, holding one expert only."""
    single = copy(experts)
    single.__dict__["_parameters"] = {
        name: torch.nn.Parameter(tensor[None], requires_grad=False) for name, tensor in weights.items()
    }
    single.num_experts = 1
    return single
