"""Checkpoints as the hub has them in FP8 and MXFP4, random and tiny, each beside what it means in plain numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import tiny_model
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
BLOCK = 16  # rows and columns that share an FP8 scale; the hub's have 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
IN_FULL = ("gate.weight", "embed_tokens.weight", "lm_head.weight", "norm.weight")  # what stays as it is in FP8
FP4 = torch.tensor([sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])

Tensors = dict[str, torch.Tensor]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _pair(family: str, folder: Path) -> tuple[Tensors, Tensors]:
    """Writes the family's model twice, `plain` and `quantised`; the tensors of both, not yet quantised."""
    tiny_model(family).save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "quantised")
    return load_file(folder / "plain" / WEIGHTS), load_file(folder / "quantised" / WEIGHTS)


def _write(folder: Path, plain: Tensors, quantised: Tensors, config: dict[str, Any]) -> Path:
    save_file(plain, folder / "plain" / WEIGHTS, metadata={"format": "pt"})
    save_file(quantised, folder / "quantised" / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder / "quantised", quantization_config=config)
    return folder


def write_fp8(family: str, folder: Path) -> Path:
    """`folder`/quantised in FP8 with a scale per block, the last block of a row or column cut, and `folder`/plain."""
    plain, quantised = _pair(family, folder)
    for name, tensor in list(quantised.items()):
        if tensor.dim() == 2 and not name.endswith(IN_FULL):
            grid = [math.ceil(size / BLOCK) for size in tensor.shape]
            padded = torch.zeros([size * BLOCK for size in grid])
            padded[: tensor.shape[0], : tensor.shape[1]] = tensor
            scale = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3)) / FP8_MAX
            every = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: tensor.shape[0], : tensor.shape[1]]
            quantised[name] = (tensor / every).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scale
            plain[name] = quantised[name].float() * every
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return _write(folder, plain, quantised, config)


def write_mxfp4(folder: Path) -> Path:
    """gpt-oss with its experts in MXFP4: 32 values to a scale, two to a byte, the lower half first."""
    plain, quantised = _pair("gpt_oss", folder)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in list(plain.items()):
        if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name:
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 125, blocks.shape[:3], dtype=torch.uint8, generator=generator)
            values = FP4[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
            values = values * (scales.float() - 127).exp2()[..., None]
            plain[name] = values.flatten(-2).transpose(1, 2).contiguous()
            del quantised[name]
            quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return _write(folder, plain, quantised, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
