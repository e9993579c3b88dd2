"""A node's experts in torch on the CPU, and the choice of the GPU's (`cuda_experts`) where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from jetson_node.experts import AUTO, Float32, HeldExperts, Segments, check_memory, told
from jetson_node.shard import Shard
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import Weights, ffn_torch
from testbed.checkpoint.manifest import Manifest
from testbed.checkpoint.packed_weights import FLOAT_DTYPES, compute_dtype, hold_expert
from testbed.checkpoint.stored_formats import FLOAT_NAMES, expert_bytes, held_format
from testbed.errors import CheckpointError


def torch_experts(
    path: Path, manifest: Manifest, device: str, *, weight_format: str, dtype: str, threads: int | None
) -> TorchExperts:
    """The experts of a shard, on the GPU where torch finds one. Raises CheckpointError, as `make_experts` says."""
    if dtype not in (AUTO, *FLOAT_DTYPES):
        raise CheckpointError(f"dtype {dtype!r}: experts compute in {', '.join(FLOAT_DTYPES)}, or {AUTO}")
    if threads is not None:
        torch.set_num_threads(threads)
    has_gpu = torch.cuda.is_available()
    held = held_format(weight_format, "gpu" if has_gpu else "cpu") if dtype == AUTO else dtype
    if has_gpu:
        from jetson_node.cuda_experts import CudaExperts  # noqa: PLC0415 - it builds on this module

        return CudaExperts(path, manifest, device, weight_format=weight_format, dtype=held)
    return TorchExperts(path, manifest, device, weight_format=weight_format, dtype=held)


class TorchExperts(HeldExperts):
    """See `jetson_node.experts.Experts`. Weights are copied once, into memory that torch aligned: the bits of a
    one-row product depend on it, and a tensor mapped from a file is aligned to eight bytes only.
    """

    where = "cpu"

    def __init__(self, path: Path, manifest: Manifest, device: str, *, weight_format: str, dtype: str) -> None:
        super().__init__(manifest, device)
        self._format, self._dtype = weight_format, compute_dtype(weight_format, dtype)
        held = dtype if weight_format in FLOAT_NAMES else weight_format
        self.backend = told(f"torch {self.where}", held, weight_format)
        needed_bytes = sum(expert_bytes(spec, held) for spec in self._specs.values())
        with Shard(path) as shard:
            shard.check(self._specs, weight_format)
            check_memory(path, len(self._specs), needed_bytes, *self._room(), self._smaller(held))
            self._weights = {
                key: self._hold(as_tensors(shard.expert(*key, spec, weight_format)), spec)
                for key, spec in self._specs.items()
            }

    def _smaller(self, held: str) -> str:
        """What to do where weights held so do not fit."""
        if held == "float32" and self._format in FLOAT_NAMES and self._format != held:
            return f"hold them as they are stored, --dtype {self._format}"
        return "split with weight format int8 or int4"

    def _room(self) -> tuple[int, str]:
        """Bytes that are free for weights, and where."""
        return psutil.virtual_memory().available, "this machine"

    def _hold(self, stored: dict[str, torch.Tensor], spec: FfnSpec) -> Weights:
        return hold_expert(stored, spec, self._format, self._dtype)

    @torch.inference_mode()
    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32:
        x = torch.from_numpy(x_RD).to(self._dtype)  # no copy in float32
        out_RD = self._outputs.take(*x_RD.shape)
        out = torch.from_numpy(out_RD)
        start = 0
        for expert, rows in segments:
            block = slice(start, start + rows)
            out[block] = ffn_torch(x[block], self._weights[layer, expert], self._specs[layer, expert])
            start += rows
        return out_RD


def as_tensors(stored: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """The same memory as tensors; numpy's stand-in for bfloat16 is read as what it is."""
    return {
        part: torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)
        for part, array in stored.items()
    }
