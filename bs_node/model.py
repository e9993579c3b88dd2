"""Loads the base station's part of a model: everything but the experts, which are never in its memory.

`experts_of` says where the experts were; whoever answers for them hangs itself onto those modules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from testbed.checkpoint.families import DTYPES, empty_model, experts_of
from testbed.checkpoint.manifest import BS_NAME, Dtype, Manifest, verify_file
from testbed.checkpoint.own_code import allow_own_code
from testbed.errors import CheckpointError, ConfigError

__all__ = ["experts_of", "load_bs_model", "load_tokenizer", "plain_model"]

DeviceName = Literal["auto", "cpu", "cuda"]


def compute_device(name: DeviceName) -> torch.device:
    """Where the base station computes; "auto" is the GPU where torch finds one. Raises ConfigError for none."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            f'model.device: "cuda", but torch {torch.__version__} finds no GPU here; install a torch built for this '
            'machine\'s GPU, or set device = "cpu"'
        )
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def load_bs_model(
    split_dir: Path,
    manifest: Manifest,
    dtype: Dtype,
    implementation: str,
    device: DeviceName = "cpu",
    *,
    trusted: str | None = None,
) -> Any:
    """The model without its experts, in eval mode, its experts modules calling the experts function `implementation`.

    `implementation` is a name registered with transformers' ALL_EXPERTS_FUNCTIONS. Every tensor equals that of
    `from_pretrained` in value and dtype. trusted: the name of a model whose own code may run. Raises CheckpointError
    for a file that is damaged or not of this split, for code that was not allowed and for a model that the GPU does
    not take, ConfigError for a GPU that is not there.
    """
    where = compute_device(device)
    split_dir = Path(split_dir)
    stored = load_file(verify_file(split_dir, BS_NAME, manifest))
    verify_file(split_dir, "config.json", manifest)
    _allow_code(split_dir, manifest, trusted)
    model = empty_model(split_dir, DTYPES[dtype], implementation)
    _check_layers(model, manifest)
    for experts in experts_of(model).values():
        for name in list(experts._parameters):
            setattr(experts, name, None)
    loaded = model.load_state_dict(_cast(model, stored, DTYPES[dtype]), strict=False, assign=True)
    if loaded.unexpected_keys or not set(loaded.missing_keys) <= set(model.all_tied_weights_keys):
        names = [*loaded.unexpected_keys, *loaded.missing_keys]
        raise CheckpointError(f"{split_dir / BS_NAME}: {names[0]} does not fit the model; split the model again")
    model.tie_weights()  # assigning broke the tie of head and embedding
    if (split_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(split_dir)
    return _moved(model.requires_grad_(False).eval(), where, manifest)


def load_tokenizer(split_dir: Path, manifest: Manifest) -> Any:
    """Of the model that `load_bs_model` has loaded from there. Raises CheckpointError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(split_dir, trust_remote_code=bool(_code_files(manifest)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{split_dir}: no tokenizer of {manifest.model_name} in it that can be read; put tokenizer.json and "
            "tokenizer_config.json beside the checkpoint, and split it again into another folder"
        ) from error


def _code_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.endswith(".py")]


def _allow_code(split_dir: Path, manifest: Manifest, trusted: str | None) -> None:
    for name in _code_files(manifest):
        verify_file(split_dir, name, manifest)
    allow_own_code(split_dir, manifest.model_name, trusted)


def _moved(model: Any, where: torch.device, manifest: Manifest) -> Any:
    try:
        return model.to(where)
    except RuntimeError as error:  # on a Jetson a full memory is not always torch's OutOfMemoryError
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{manifest.model_name}: the GPU does not take the base station's part ({reason:.200}); free its memory, "
            'or set [model] device = "cpu"'
        ) from error


def _check_layers(model: Any, manifest: Manifest) -> None:
    if list(experts_of(model)) != [layer.path for layer in manifest.layers]:
        raise CheckpointError(
            f"{manifest.model_name}: config and manifest disagree on MoE layers; split the model again"
        )


def _cast(model: Any, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of the tensors, in memory that torch aligned, in the dtype that `from_pretrained` would give them."""
    plan = model._get_dtype_plan(dtype)  # some gates and biases stay in fp32 in a bf16 model
    wanted = model.state_dict()
    result = {}
    for name, tensor in stored.items():
        kept = next((kept for part, kept in plan.items() if re.search(rf"(^|\.){part}(\.|$)", name)), None)
        target = wanted[name].dtype if name in wanted else tensor.dtype
        result[name] = tensor.to(kept if kept and tensor.is_floating_point() else target, copy=True)
    return result


def plain_model(model_dir: Path, dtype: Dtype) -> Any:
    """The unmodified Hugging Face model with its own eager experts: what the distributed one must equal."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype], experts_implementation="eager")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # bits depend on alignment, and a mapped file's is eight bytes
    return model.requires_grad_(False).eval()
