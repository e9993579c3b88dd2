"""A node's experts: the shard it loads, and the FFN in numpy.

The numpy FFN needs no torch. It is the reference that the tests hold every other one against, and a node's last resort.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from jetson_node.shard import Shard
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest, shard_name, verify_file
from testbed.checkpoint.stored_formats import check_format, decoded, expert_bytes, format_of
from testbed.errors import CheckpointError, MessageError
from testbed.wire.kept import KeptRows

Float32 = NDArray[np.float32]
Segments = Sequence[tuple[int, int]]  # (expert, rows)
Backend = Literal["auto", "torch", "numpy"]
AUTO = "auto"  # dtype: as `held_format` says


class Experts(Protocol):
    """The experts of one device. `segments` lists (expert, rows): the rows of x_RD follow one another in this order,
    and all rows of an expert are in one segment, because the bits of a product depend on how many rows it has.
    """

    backend: str  # on what it computes, and in which weights
    staging_ns: int | None  # of the last block: copies between this machine's memory and the GPU's; None without a GPU

    def check(self, layer: int, segments: Segments, rows: int, width: int) -> None:
        """Raises MessageError unless every expert is here, comes once, and rows and width are right."""

    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32:
        """The experts' outputs out_RD, row by row, of what `check` accepts. Valid until the next call."""

    def warm_up(self) -> None:
        """Computes a row with every expert, so that the first real one pays for nothing but itself."""


def make_experts(
    split_dir: Path,
    manifest: Manifest,
    device: str,
    *,
    backend: Backend = "auto",
    dtype: str = AUTO,
    threads: int | None = None,
    weight_format: str | None = None,
) -> Experts:
    """The experts that the manifest places on `device`, from its shard in `split_dir`, once its sha256 is right.

    backend: "auto" is torch where it is installed (CUDA where there is one), else numpy. dtype: what torch holds
    and computes in where the shard is float32, float16 or bfloat16: "auto" is the shard's own on a GPU and float32 on a
    CPU. int8 and int4 are held as they are and compute in bfloat16; numpy holds and computes in float32, always.
    threads: torch's, where given. weight_format: of the shard, the manifest's if None. Raises CheckpointError for a
    shard that is missing, damaged or incomplete, and for one that does not fit into memory.
    """
    weight_format = weight_format or format_of(manifest, device)
    check_format(weight_format)
    path = verify_file(split_dir, shard_name(device), manifest)
    if backend == "auto":
        backend = "torch" if importlib.util.find_spec("torch") else "numpy"
    if backend == "numpy":
        return NumpyExperts(path, manifest, device, weight_format=weight_format)
    if not importlib.util.find_spec("torch"):
        raise CheckpointError("backend torch: torch is not installed here; install it or use backend numpy")
    from jetson_node.torch_experts import torch_experts  # noqa: PLC0415 - a node without torch must get this far

    return torch_experts(path, manifest, device, weight_format=weight_format, dtype=dtype, threads=threads)


def check_memory(path: Path, experts: int, needed_bytes: int, available_bytes: int, where: str, smaller: str) -> None:
    """Raises CheckpointError where the experts of a shard do not fit: a board that swaps looks like a dead one.

    `smaller` says what makes them take less.
    """
    if needed_bytes > available_bytes:
        raise CheckpointError(
            f"{path}: {experts} experts need {needed_bytes / 1e9:.2f} GB, {where} has {available_bytes / 1e9:.2f} GB "
            f"free; {smaller}, or place fewer experts on this device"
        )


def told(where: str, held: str, stored: str) -> str:
    """What the log says a node computes on, and in which weights."""
    return f"{where} {held}" if held == stored else f"{where} {held} from {stored}"


class HeldExperts(ABC):
    """What every backend shares: which experts are here, and how a block is cut into them."""

    backend: str
    staging_ns: int | None = None

    def __init__(self, manifest: Manifest, device: str) -> None:
        self._specs = {(layer, expert): manifest.layers[layer].spec for layer, expert in manifest.held_by(device)}
        self._outputs = KeptRows(np.float32)

    @abstractmethod
    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32: ...

    def check(self, layer: int, segments: Segments, rows: int, width: int) -> None:
        experts = [expert for expert, _ in segments]
        if len(set(experts)) != len(experts):
            raise MessageError(f"layer {layer}: an expert comes in two segments; all its rows belong in one")
        for expert in experts:
            if (layer, expert) not in self._specs:
                raise MessageError(f"layer {layer}: expert {expert} is not on this device")
            if width != self._specs[layer, expert].width:
                raise MessageError(f"layer {layer}: rows of {width}, expected {self._specs[layer, expert].width}")
        if (said := sum(rows for _, rows in segments)) != rows:
            raise MessageError(f"layer {layer}: segments of {said} rows for a block of {rows}")

    def warm_up(self) -> None:
        for (layer, expert), spec in self._specs.items():
            self.compute(layer, [(expert, 1)], np.zeros((1, spec.width), np.float32))


class NumpyExperts(HeldExperts):
    """The reference: float32, one thread of Python."""

    def __init__(self, path: Path, manifest: Manifest, device: str, *, weight_format: str) -> None:
        super().__init__(manifest, device)
        self.backend = told("numpy", "float32", weight_format)
        needed_bytes = sum(expert_bytes(spec, "float32") for spec in self._specs.values())
        with Shard(path) as shard:
            shard.check(self._specs, weight_format)
            room = psutil.virtual_memory().available
            check_memory(
                path, len(self._specs), needed_bytes, room, "this machine", "install torch: numpy takes float32"
            )
            self._weights = {
                key: decoded(shard.expert(*key, spec, weight_format), spec, weight_format)
                for key, spec in self._specs.items()
            }

    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32:
        out_RD, start = self._outputs.take(*x_RD.shape), 0
        for expert, rows in segments:
            block = slice(start, start + rows)
            out_RD[block] = ffn_numpy(x_RD[block], self._weights[layer, expert], self._specs[layer, expert])
            start += rows
        return out_RD


def ffn_numpy(x_RD: Float32, weights: Mapping[str, Float32], spec: FfnSpec) -> Float32:
    """One expert on R rows, as `testbed.checkpoint.ffn` writes it."""
    inner_RI = x_RD @ weights[spec.first].T
    if spec.has_bias:
        inner_RI = inner_RI + weights[f"{spec.first}_bias"]
    inner_RI = _gated(inner_RI, spec) if spec.has_gate else ACTIVATIONS[spec.act](inner_RI)
    y_RD: Float32 = inner_RI @ weights["down"].T
    return y_RD + weights["down_bias"] if spec.has_bias else y_RD


def _gated(both: Float32, spec: FfnSpec) -> Float32:
    gate_RI, up_RI = np.split(both, 2, axis=-1)
    if spec.limit is not None:
        gate_RI, up_RI = np.minimum(gate_RI, spec.limit), np.clip(up_RI, -spec.limit, spec.limit)
    if spec.alpha is not None:
        up_RI, gate_RI = up_RI + 1, gate_RI * _sigmoid(gate_RI * spec.alpha)
    else:
        gate_RI = ACTIVATIONS[spec.act](gate_RI)
    hidden_RI: Float32 = gate_RI * up_RI
    return hidden_RI


def _sigmoid(x: Float32) -> Float32:
    tail: Float32 = np.exp(-np.abs(x))  # at most 1: never overflows
    return np.asarray(np.where(x >= 0, np.float32(1), tail) / (1 + tail), np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(x: Float32) -> Float32:
    erf: Float32 = _erf(x * np.float32(math.sqrt(0.5)))
    return x * np.float32(0.5) * (1 + erf)


def _gelu_tanh(x: Float32) -> Float32:
    tanh: Float32 = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))
    return x * np.float32(0.5) * (1 + tanh)


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
}
