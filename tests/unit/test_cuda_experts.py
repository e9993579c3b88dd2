"""The GPU's path, on a GPU where there is one; elsewhere its own code alone, on a stand-in that computes on the CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from splits import write_split

from jetson_node.experts import ffn_numpy, make_experts
from testbed.checkpoint.ffn import FfnSpec, tensor_name
from testbed.checkpoint.manifest import Manifest, file_entry, shard_name
from testbed.checkpoint.stored_formats import FORMATS
from testbed.errors import CheckpointError

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402 - torch may be missing
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from jetson_node import cuda_experts  # noqa: E402
from testbed.checkpoint.ffn_torch import ffn_torch  # noqa: E402
from testbed.checkpoint.packed_weights import CPU_MATRICES  # noqa: E402
from testbed.checkpoint.weight_formats import encode_expert  # noqa: E402

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: not yet run on one")

SPEC = FfnSpec(width=96, inner=160, has_bias=True)
CLOSE = {
    "float32": 1e-3,
    "float16": 5e-3,
    "bfloat16": 0.03,
    "int8": 0.05,
    "int4": 0.4,
}  # float32: TF32 is off, sums differ


class Recorder(TorchDispatchMode):
    """Remembers every operation with the memory that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class StandInGraph:
    """Replays what was recorded into the same memory, as a graph does."""

    def capture_begin(self, pool: Any) -> None:
        assert pool is not None
        self._recorder = Recorder()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, out in self._recorder.operations:
            again = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and again.data_ptr() != out.data_ptr():
                out.copy_(again)


class StandInEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: StandInEvent) -> float:
        return 2.0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    stream = SimpleNamespace(wait_stream=lambda _: None)
    cuda = SimpleNamespace(
        CUDAGraph=StandInGraph, Event=StandInEvent, Stream=lambda: stream, current_stream=lambda: stream,
        stream=lambda _: contextlib.nullcontext(), graph_pool_handle=lambda: (0, 0), synchronize=lambda: None,
        get_device_capability=lambda: (8, 7), mem_get_info=lambda: (1 << 40, 1 << 40),
        get_device_properties=lambda _: SimpleNamespace(is_integrated=False), get_device_name=lambda _: "stand-in",
    )  # fmt: skip
    for name in vars(cuda):
        monkeypatch.setattr(f"jetson_node.cuda_experts.torch.cuda.{name}", getattr(cuda, name), raising=False)
    monkeypatch.setattr(cuda_experts, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_experts, "CUDA_MATRICES", CPU_MATRICES)
    return cuda


def encoded_split(directory: Path, fmt: str) -> tuple[Manifest, Any]:
    manifest, weights = write_split(directory, SPEC)
    held = {
        tensor_name(*key, part): tensor
        for key in manifest.held_by("far")
        for part, tensor in encode_expert({n: torch.from_numpy(a) for n, a in weights[key].items()}, fmt, SPEC).items()
    }
    save_file(held, directory / shard_name("far"))
    files = {name: file_entry(directory / name) for name in manifest.files}
    return manifest.model_copy(update={"files": files}), weights


def on_cuda(directory: Path, manifest: Manifest, fmt: str) -> cuda_experts.CudaExperts:
    dtype = fmt if fmt in ("float16", "bfloat16") else "float32"
    return cuda_experts.CudaExperts(directory / shard_name("far"), manifest, "far", weight_format=fmt, dtype=dtype)


def random_rows(rows: int) -> Any:
    return np.random.default_rng(rows).standard_normal((rows, SPEC.width)).astype(np.float32)


def check_outputs(experts: cuda_experts.CudaExperts, weights: Any, fmt: str) -> None:
    for first, second in ((1, 2), (2, 5), (1, 1), (40, 3), (1, 2)):
        x_RD = random_rows(first + second)
        wanted_RD = np.concatenate(
            [ffn_numpy(x_RD[:first], weights[1, 3], SPEC), ffn_numpy(x_RD[first:], weights[1, 1], SPEC)]
        )
        out_RD = experts.compute(1, [(3, first), (1, second)], x_RD)
        assert np.linalg.norm(out_RD - wanted_RD) < CLOSE[fmt] * np.linalg.norm(wanted_RD)


@pytest.mark.cuda
@no_gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gpu_computes_what_the_reference_computes_with_and_without_graphs(fmt: str, tmp_path: Path) -> None:
    manifest, weights = encoded_split(tmp_path, fmt)
    experts = on_cuda(tmp_path, manifest, fmt)
    check_outputs(experts, weights, fmt)
    experts._gains = lambda *_: True  # type: ignore[method-assign] # graphs whether or not they pay
    experts.warm_up()
    check_outputs(experts, weights, fmt)
    assert experts.staging_ns is not None
    assert experts.staging_ns > 0


@pytest.mark.cuda
@no_gpu
def test_a_node_takes_the_gpu_where_there_is_one(tmp_path: Path) -> None:
    manifest, _ = encoded_split(tmp_path, "float16")
    right = manifest.model_copy(update={"dtype": "float16"})
    name = torch.cuda.get_device_name()
    assert make_experts(tmp_path, right, "far").backend == f"torch cuda float16 ({name})"
    assert make_experts(tmp_path, right, "far", dtype="float32").backend == f"torch cuda float32 from float16 ({name})"


@pytest.mark.parametrize("graphs_pay", [True, False])
@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
def test_blocks_come_back_right_and_staging_is_told(
    fmt: str, graphs_pay: bool, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, weights = encoded_split(tmp_path, fmt)
    experts = on_cuda(tmp_path, manifest, fmt)
    monkeypatch.setattr(experts, "_gains", lambda *_: graphs_pay)
    experts.warm_up()
    assert len(experts._graphs) == (2 * 2 * 2 if graphs_pay else 0)  # layers, experts held, rows 1 and 2
    check_outputs(experts, weights, fmt)
    assert experts.staging_ns is not None
    assert experts.staging_ns >= 4_000_000  # 2 ms each way by the stand-in's events


def test_a_graph_that_cannot_be_recorded_is_done_without(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandInGraph, "capture_begin", refuse)
    manifest, weights = encoded_split(tmp_path, "float32")
    experts = on_cuda(tmp_path, manifest, "float32")
    experts.warm_up()
    assert not experts._graphs
    check_outputs(experts, weights, "float32")


def test_a_recording_that_fails_half_way_is_ended_and_none_is_tried_again(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(StandInGraph, "capture_begin", lambda *_, **__: told.append("begin"))
    monkeypatch.setattr(StandInGraph, "capture_end", lambda _: told.append("end"))

    def only_outside_a_recording(*args: Any) -> Any:
        if told.count("begin") > told.count("end"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return ffn_torch(*args)

    monkeypatch.setattr(cuda_experts, "ffn_torch", only_outside_a_recording)
    manifest, weights = encoded_split(tmp_path, "float32")
    experts = on_cuda(tmp_path, manifest, "float32")
    experts.warm_up()
    assert told == ["begin", "end"]
    check_outputs(experts, weights, "float32")


def test_int4_on_a_gpu_without_the_tensor_cores_for_it_is_refused(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 2))
    manifest, _ = encoded_split(tmp_path, "int4")
    with pytest.raises(CheckpointError, match=r"capability 8\.0; split with weight format int8"):
        on_cuda(tmp_path, manifest, "int4")


def test_experts_that_do_not_fit_on_the_gpu_are_refused(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = encoded_split(tmp_path, "float32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 10**9))
    with pytest.raises(CheckpointError, match=r"4 experts need .* the GPU has 0\.00 GB free"):
        on_cuda(tmp_path, manifest, "float32")


def test_int8_on_a_gpu_is_the_product_with_the_widened_matrix() -> None:
    weights = {"up": torch.randn(20, 70), "down": torch.randn(70, 20)}
    spec = FfnSpec(width=70, inner=20, has_gate=False)
    stored = encode_expert(weights, "int8", spec)
    x_RI = torch.randn(3, 70)
    ours = cuda_experts.CudaInt8(stored["up"], stored["up_scale"].bfloat16(), (20, 70)).times(x_RI)
    theirs = CPU_MATRICES["int8"](stored["up"], stored["up_scale"], (20, 70)).times(x_RI)
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-2)
