"""A node's experts on a GPU. Not yet run on a GPU: written against what torch documents.

Rows go through pinned memory, kept from block to block, so that each direction is one copy by the GPU's own engine and
a block waits once, at its end. That staging is timed by itself. One or two rows of a small expert are launches more
than arithmetic: they are replayed as a CUDA graph where that was measured to be faster when the node warmed up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from jetson_node.experts import Float32, Segments
from jetson_node.torch_experts import TorchExperts
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import Weights, ffn_torch
from testbed.checkpoint.manifest import Manifest
from testbed.checkpoint.packed_weights import PACKED_DTYPE, PackedMatrix, hold_expert
from testbed.errors import CheckpointError

DEVICE = "cuda"
GRAPHED_ROWS = (1, 2)
GRAPH_GAIN = 0.95  # of the time without a graph: less is not worth the memory
TIMED_RUNS = 20
INT4_CAPABILITY = (8, 0)  # the tensor cores that torch's int4 kernel is written for: Orin has them, Xavier not
TILE_INPUTS = 16  # an inner k-tile of that kernel

Ffn = Callable[[torch.Tensor], torch.Tensor]


class CudaInt8(PackedMatrix):
    """Widened for each product: torch's own int8 kernel has a thread per output on a GPU and reads out of step."""

    def _pack(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._filled = values.shape[1]
        self._q_OI, self._scale_O = values, scales

    def _product(self, x_RI: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_RI, self._q_OI.to(PACKED_DTYPE)) * self._scale_O


class CudaInt4(PackedMatrix):
    """torch's tensor-core kernel. A shard stores the order of nibbles that its packing reads."""

    def _pack(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._filled, self._group = 2 * values.shape[1], 2 * values.shape[1] // scales.shape[1]
        missing = -len(values) % 16
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        scales = torch.nn.functional.pad(scales, (0, 0, 0, 0, 0, missing))
        inner_tiles = next(tiles for tiles in (8, 4, 2) if self._filled % (tiles * TILE_INPUTS) == 0)
        self._packed = torch.ops.aten._convert_weight_to_int4pack(values.contiguous(), inner_tiles)
        self._scale_zero_GO2 = scales.transpose(0, 1).contiguous()

    def _product(self, x_RI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            x_RI, self._packed, self._group, self._scale_zero_GO2
        )
        return product


CUDA_MATRICES: dict[str, type[PackedMatrix]] = {"int8": CudaInt8, "int4": CudaInt4}


class PinnedRows:
    """Float32 rows in memory that the GPU copies from and to by itself; used again, valid until the next `take`."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def take(self, rows: int, width: int) -> torch.Tensor:
        if self._values.numel() < rows * width:
            self._values = torch.empty(rows * width, pin_memory=torch.cuda.is_available())
        return self._values[: rows * width].view(rows, width)


class ExpertGraph:
    """One expert on a fixed number of rows, recorded once and launched as a whole.

    `pool` is memory that graphs share: they never run at the same time and keep nothing in it. `stream` is theirs too,
    because cuBLAS takes working memory for every stream.
    """

    def __init__(self, x_RD: torch.Tensor, ffn: Ffn, pool: Any, stream: torch.cuda.Stream) -> None:
        self._x_RD, self._y_RD = torch.zeros_like(x_RD), torch.empty_like(x_RD, dtype=torch.float32)
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`: it empties caches before each of hundreds; after an error its stream stays current.
        with torch.cuda.stream(stream):
            self._y_RD.copy_(ffn(self._x_RD))  # kernels are loaded before they are recorded
            self._graph.capture_begin(pool=pool)
            try:
                self._y_RD.copy_(ffn(self._x_RD))
            finally:
                self._graph.capture_end()  # after an error too: until then the GPU takes no other work
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        self._x_RD.copy_(x_RD)
        self._graph.replay()
        return self._y_RD


class CudaExperts(TorchExperts):
    """See `jetson_node.experts.Experts`. `staging_ns` is what a block's copies took, host to GPU and back."""

    where = "cuda"

    def __init__(self, path: Path, manifest: Manifest, device: str, *, weight_format: str, dtype: str) -> None:
        if weight_format == "int4" and torch.cuda.get_device_capability() < INT4_CAPABILITY:
            raise CheckpointError(f"{path}: int4 needs a GPU of compute capability 8.0; split with weight format int8")
        self._device = torch.device(DEVICE)
        self._inputs, self._results = PinnedRows(), PinnedRows()
        self._stamps = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[int, int, int], ExpertGraph] = {}
        try:
            super().__init__(path, manifest, device, weight_format=weight_format, dtype=dtype)
        except RuntimeError as error:  # on a Jetson a full memory is not always torch's OutOfMemoryError
            raise CheckpointError(f"{path}: the GPU does not take the experts: {error!s:.200}") from error
        self.backend += f" ({torch.cuda.get_device_name(self._device)})"

    def _room(self) -> tuple[int, str]:
        if torch.cuda.get_device_properties(self._device).is_integrated:  # CUDA's figure lacks what Linux can give back
            return super()._room()
        return torch.cuda.mem_get_info()[0], "the GPU"

    def _hold(self, stored: dict[str, torch.Tensor], spec: FfnSpec) -> Weights:
        return hold_expert(stored, spec, self._format, self._dtype, device=self._device, matrices=CUDA_MATRICES)

    @torch.inference_mode()
    def compute(self, layer: int, segments: Segments, x_RD: Float32) -> Float32:
        began_ns = time.monotonic_ns()
        inputs_RD, results_RD = self._inputs.take(*x_RD.shape), self._results.take(*x_RD.shape)
        inputs_RD.copy_(torch.from_numpy(x_RD))
        host_ns = time.monotonic_ns() - began_ns
        self._stamps[0].record()
        rows_RD = inputs_RD.to(self._device, non_blocking=True)
        self._stamps[1].record()
        out_RD = self._on_gpu(layer, segments, rows_RD.to(self._dtype))
        self._stamps[2].record()
        results_RD.copy_(out_RD, non_blocking=True)
        self._stamps[3].record()
        self._stamps[3].synchronize()
        down_ms, _, up_ms = (first.elapsed_time(second) for first, second in pairwise(self._stamps))
        self.staging_ns = host_ns + int((down_ms + up_ms) * 1e6)
        result: Float32 = results_RD.numpy()
        return result

    def _on_gpu(self, layer: int, segments: Segments, x_RD: torch.Tensor) -> torch.Tensor:
        out_RD, start = torch.empty_like(x_RD, dtype=torch.float32), 0
        for expert, rows in segments:
            block = slice(start, start + rows)
            graph = self._graphs.get((layer, expert, rows))
            out_RD[block] = self._ffn(layer, expert)(x_RD[block]) if graph is None else graph(x_RD[block])
            start += rows
        return out_RD

    def _ffn(self, layer: int, expert: int) -> Ffn:
        return lambda x_RD: ffn_torch(x_RD, self._weights[layer, expert], self._specs[layer, expert])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Beside a row with every expert: records graphs, of those specs and rows for which the first one gains."""
        super().warm_up()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pays: dict[tuple[FfnSpec, int], bool] = {}
        for (layer, expert), spec in self._specs.items():
            for rows in GRAPHED_ROWS:
                if pays.get((spec, rows)) is False:
                    continue
                ffn = self._ffn(layer, expert)
                x_RD = torch.zeros(rows, spec.width, device=self._device, dtype=self._dtype)
                graph = _recorded(x_RD, ffn, pool, stream)  # the last one is held until then: a pool needs one
                if graph is None:
                    return
                if (spec, rows) not in pays:
                    pays[spec, rows] = self._gains(graph, ffn, x_RD)
                if pays[spec, rows]:
                    self._graphs[layer, expert, rows] = graph

    def _gains(self, graph: ExpertGraph, ffn: Ffn, x_RD: torch.Tensor) -> bool:
        return self._milliseconds(graph, x_RD) < GRAPH_GAIN * self._milliseconds(ffn, x_RD)

    def _milliseconds(self, ffn: Ffn, x_RD: torch.Tensor) -> float:
        """Median time until the GPU is done, launches included."""
        times = []
        for _ in range(TIMED_RUNS):
            torch.cuda.synchronize()
            began_ns = time.perf_counter_ns()
            ffn(x_RD)
            torch.cuda.synchronize()
            times.append((time.perf_counter_ns() - began_ns) / 1e6)
        return median(times)


def _recorded(x_RD: torch.Tensor, ffn: Ffn, pool: Any, stream: torch.cuda.Stream) -> ExpertGraph | None:
    """None where torch or driver cannot record this: experts then run without a graph."""
    try:
        return ExpertGraph(x_RD, ffn, pool, stream)
    except RuntimeError:
        return None
