"""What transformers tells of a model's experts, for every family that uses its experts interface.

The interface (`transformers.integrations.moe`) marks an experts module with `has_gate`, `is_transposed` and others; the
module keeps no name of its activation, so that one is found by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from testbed.checkpoint.ffn import FfnSpec, SumDtype
from testbed.checkpoint.ffn_torch import ACTIVATIONS
from testbed.checkpoint.manifest import Dtype
from testbed.errors import CheckpointError

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Families whose own class sums a layer in another dtype than that of its input.
SUM_DTYPE: dict[str, SumDtype] = {"NemotronHExperts": "weight", "OpenAIPrivacyFilterExperts": "float32"}


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Module path -> experts module, in the order of the forward pass. Empty: the model is not one we can run."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")}


def read_config(directory: Path) -> Any:
    """A fresh config object: the name of the experts implementation lives in it, so no two models may share one."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{directory}: transformers cannot read this config: {reason:.200}") from error


def empty_model(directory: Path, dtype: torch.dtype, implementation: str) -> Any:
    """The model with its parameters on the meta device and its buffers computed for real: a few MiB at any size."""
    config = read_config(directory)
    config.quantization_config = None  # a split is stored dequantised
    factory: Any = AutoModelForCausalLM
    if type(config) not in factory._model_mapping:
        raise CheckpointError(
            f"{directory}: {config.model_type} is not a causal language model for transformers; of one that also reads "
            "images or sound, use the checkpoint of its language model alone"
        )
    try:
        with init_empty_weights(include_buffers=False):
            return factory.from_config(config, dtype=dtype, experts_implementation=implementation)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{directory / 'config.json'}: no {config.model_type} can be built from it ({reason:.160}); "
            "download it again"
        ) from error


def gate_of(model: nn.Module, path: str) -> Any:
    """The gate that chooses for the experts at `path`: it has the same parent. None where there is none."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return next((child for name, child in parent.named_children() if name in ("gate", "router")), None)


def top_k_of(model: Any, path: str) -> int:
    """Experts per token (K). Raises CheckpointError where neither gate nor config says it."""
    config = model.config
    places = ((gate_of(model, path), "top_k"), (config, "num_experts_per_tok"), (config, "top_k_experts"))
    for place, name in places:
        if type(value := getattr(place, name, None)) is int:
            return value
    raise CheckpointError(
        f"{config.model_type}: neither the gate of {path} nor the config says how many experts it picks"
    )


def expert_parameters(experts: Any) -> list[str]:
    """Names of the parameters that hold one row per expert; a norm below the module is not among them."""
    return [name for name, _ in experts.named_parameters(recurse=False)]


def describe(experts: Any) -> FfnSpec:
    """The spec of an experts module. Raises CheckpointError for an activation that no node knows."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    out_first, in_first = (1, 0) if experts.is_transposed else (0, 1)
    shape = getattr(experts, first).shape[1:]
    alpha = getattr(experts, "alpha", getattr(experts, "swiglu_alpha", None))
    return FfnSpec(
        width=shape[in_first],
        inner=shape[out_first] // 2 if experts.has_gate else shape[out_first],
        has_gate=experts.has_gate,
        has_bias=experts.has_bias,
        act="silu" if alpha is not None else _activation(experts),
        limit=getattr(experts, "limit", getattr(experts, "swiglu_limit", None)),
        alpha=alpha,
        sum_dtype=SUM_DTYPE.get(type(experts).__name__, "hidden"),
    )


def _activation(experts: Any) -> Any:
    x = torch.linspace(-6, 6, 97)
    try:
        y = experts.act_fn(x)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{type(experts).__name__}: its activation is not a function of one value") from error
    for name, function in ACTIVATIONS.items():
        if torch.allclose(function(x), y, atol=1e-6):
            return name
    raise CheckpointError(f"{type(experts).__name__}: its activation is none of {', '.join(ACTIVATIONS)}")


def canonical(experts: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One expert's tensors under the names and in the form of a shard: [out, in], gate rows before up rows."""
    result = {}
    for name, tensor in weights.items():
        if experts.is_transposed and tensor.dim() == 2:
            tensor = tensor.T  # noqa: PLW2901
        if experts.has_gate and name.startswith("gate_up") and not experts.is_concatenated:
            tensor = torch.cat([tensor[::2], tensor[1::2]])  # noqa: PLW2901
        result[name.replace("_proj", "")] = tensor.contiguous()
    return result
