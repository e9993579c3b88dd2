"""A node's experts in torch: CUDA where there is one, else CPU. The only module of a node that imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jetson_node.experts import Float32, HeldExperts, Segments, check_shard
from testbed.checkpoint.ffn import FfnSpec, tensor_name
from testbed.checkpoint.ffn_torch import ffn_torch
from testbed.checkpoint.manifest import Manifest
from testbed.errors import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchExperts(HeldExperts):
    """See `jetson_node.experts.Experts`. Weights are copied once, into memory that torch aligned: the bits of a
    one-row product depend on it, and a tensor mapped from a file is aligned to eight bytes only.
    """

    def __init__(
        self, path: Path, manifest: Manifest, device: str, *, dtype: str = "float32", threads: int | None = None
    ) -> None:
        super().__init__(manifest, device)
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r}: experts compute in {', '.join(DTYPES)}")
        if threads is not None:
            torch.set_num_threads(threads)
        self._dtype = DTYPES[dtype]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backend = f"torch {self._device.type} {dtype}"
        try:
            mapped = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}; split the model again") from error
        check_shard(path, self._specs, {name: tuple(tensor.shape) for name, tensor in mapped.items()})
        self._weights = {key: self._load(mapped, *key, spec) for key, spec in self._specs.items()}

    def _load(
        self, mapped: Mapping[str, torch.Tensor], layer: int, expert: int, spec: FfnSpec
    ) -> dict[str, torch.Tensor]:
        parts = {part: mapped[tensor_name(layer, expert, part)] for part in spec.shapes()}
        return {part: tensor.to(self._device, self._dtype, copy=True) for part, tensor in parts.items()}

    @torch.inference_mode()
    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32:
        x = torch.from_numpy(x_RD).to(self._device, self._dtype)  # no copy on a CPU in float32
        out_RD = self._outputs.take(*x_RD.shape)
        out = torch.from_numpy(out_RD)
        y = out if self._device.type == "cpu" else torch.empty_like(x)
        start = 0
        for expert, rows in segments:
            block = slice(start, start + rows)
            y[block] = ffn_torch(x[block], self._weights[layer, expert], self._specs[layer, expert])
            start += rows
        if y is not out:
            out.copy_(y)  # waits for the device
        return out_RD
