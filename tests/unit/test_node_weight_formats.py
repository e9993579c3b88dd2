from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from splits import write_split

from jetson_node.experts import ffn_numpy, make_experts
from jetson_node.shard import Shard
from testbed.checkpoint.ffn import FfnSpec, tensor_name
from testbed.checkpoint.manifest import Manifest, file_entry, shard_name
from testbed.checkpoint.stored_formats import FORMATS, expert_bytes, held_format
from testbed.errors import CheckpointError

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402 - torch may be missing

from testbed.checkpoint.weight_formats import encode_expert  # noqa: E402

SPEC = FfnSpec(width=40, inner=56, has_bias=True)
CLOSE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 0.03, "int8": 0.05, "int4": 0.4}  # as in test_weight_formats


def encoded_split(directory: Path, fmt: str, spec: FfnSpec = SPEC, **kwargs: Any) -> tuple[Manifest, Any]:
    """A split whose shards are in a format; its manifest does not know."""
    manifest, weights = write_split(directory, spec, **kwargs)
    for device in manifest.devices:
        tensors = {
            tensor_name(layer, expert, part): tensor
            for layer, expert in manifest.held_by(device)
            for part, tensor in encode_expert(
                {name: torch.from_numpy(array) for name, array in weights[layer, expert].items()}, fmt, spec
            ).items()
        }
        save_file(tensors, directory / shard_name(device))
    files = {name: file_entry(directory / name) for name in manifest.files}
    return manifest.model_copy(update={"files": files}), weights


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_node_computes_with_a_shard_in_any_format(fmt: str, backend: Any, tmp_path: Path) -> None:
    manifest, weights = encoded_split(tmp_path, fmt)
    experts = make_experts(tmp_path, manifest, "far", backend=backend, weight_format=fmt)
    experts.warm_up()
    x_RD = np.random.default_rng(1).standard_normal((6, SPEC.width)).astype(np.float32)
    out_RD = experts.compute(1, [(3, 4), (1, 2)], x_RD)
    wanted_RD = np.concatenate([ffn_numpy(x_RD[:4], weights[1, 3], SPEC), ffn_numpy(x_RD[4:], weights[1, 1], SPEC)])
    assert np.linalg.norm(out_RD - wanted_RD) < CLOSE[fmt] * np.linalg.norm(wanted_RD)
    assert experts.staging_ns is None
    if fmt != "float32":
        assert fmt in experts.backend or backend == "torch"  # torch widens float formats to the dtype asked for


@pytest.mark.parametrize(
    ("fmt", "on_numpy", "on_a_cpu"),
    [
        ("float32", "numpy float32", "torch cpu float32"),
        ("float16", "numpy float32 from float16", "torch cpu float32 from float16"),
        ("int8", "numpy float32 from int8", "torch cpu int8"),
    ],
)
def test_a_node_says_on_what_it_computes_and_in_which_weights(
    fmt: str, on_numpy: str, on_a_cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    manifest, _ = encoded_split(tmp_path, fmt)
    said = {"numpy": on_numpy, "torch": on_a_cpu}
    for backend in ("numpy", "torch"):
        experts = make_experts(tmp_path, manifest, "far", backend=backend, weight_format=fmt)  # type: ignore[arg-type]
        assert experts.backend == said[backend]
        held = said[backend].split(" from ")[0].split()[-1]
        assert held == held_format(fmt, "numpy" if backend == "numpy" else "cpu")


def test_a_dtype_that_is_asked_for_is_held_also_where_another_one_is_faster(tmp_path: Path) -> None:
    manifest, _ = encoded_split(tmp_path, "float16")
    experts = make_experts(tmp_path, manifest, "far", backend="torch", weight_format="float16", dtype="float16")
    assert experts.backend.startswith("torch ")
    assert "float16" in experts.backend
    assert "from" not in experts.backend


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_manifest_says_in_which_format_a_shard_is(backend: Any, tmp_path: Path) -> None:
    manifest, _ = encoded_split(tmp_path, "bfloat16")
    with pytest.raises(
        CheckpointError, match=r"gate_up is BF16 \[112, 40\] instead of F32 \[112, 40\]; split the model"
    ):
        make_experts(tmp_path, manifest, "far", backend=backend)
    right = manifest.model_copy(update={"dtype": "bfloat16"})
    make_experts(tmp_path, right, "far", backend=backend)
    with pytest.raises(
        CheckpointError, match=r"gate_up is BF16 \[112, 40\] instead of I8 \[112, 64\]; split the model"
    ):
        make_experts(tmp_path, right, "far", backend=backend, weight_format="int8")


def test_a_shard_gives_every_type_as_it_was_written(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.5, 0.0, 3.140625]])
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    tensors = {f"0.{n}.up": values.to(dtype, copy=True) for n, dtype in enumerate(dtypes)}
    tensors |= {f"0.{n}.down": values.to(dtype, copy=True).view(4, 1) for n, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    spec = FfnSpec(width=4, inner=1, has_gate=False)
    with Shard(tmp_path / "t.safetensors") as shard:
        for expert, fmt in enumerate(("float32", "float16", "bfloat16")):
            shard.check({(0, expert): spec}, fmt)
            up = shard.expert(0, expert, spec, fmt)["up"]
            wide = (up.astype(np.uint32) << 16).view(np.float32) if fmt == "bfloat16" else up.astype(np.float32)
            np.testing.assert_array_equal(wide, values.numpy())


@pytest.mark.parametrize(
    ("backend", "fmt", "mend"),
    [
        ("numpy", "float32", "install torch: numpy takes float32, or place fewer"),
        ("numpy", "int8", "install torch: numpy takes float32, or place fewer"),
        ("torch", "float32", "split with weight format int8 or int4, or place fewer"),
        ("torch", "float16", "hold them as they are stored, --dtype float16, or place fewer"),
    ],
)
def test_experts_that_do_not_fit_into_memory_are_refused_before_they_are_loaded(
    backend: Any, fmt: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    manifest, _ = encoded_split(tmp_path, fmt)
    room = psutil.virtual_memory()._replace(available=4 * expert_bytes(SPEC, "float32") - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    with pytest.raises(CheckpointError, match=rf"4 experts need .* GB free; {mend}"):
        make_experts(tmp_path, manifest, "far", backend=backend, weight_format=fmt)


MEASURED = """
import json, sys, threading, time
from pathlib import Path
from jetson_node.experts import make_experts
from testbed.checkpoint.manifest import Manifest

if sys.argv[2] == "torch":
    import torch, jetson_node.torch_experts
manifest = Manifest.model_validate_json(sys.stdin.read())

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, over = anonymous_bytes(), threading.Event()
def watch():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous_bytes())
        over.wait(0.001)

before = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()
experts = make_experts(Path(sys.argv[1]), manifest, "far", backend=sys.argv[2], weight_format=sys.argv[3], threads=1)
over.set()
thread.join()
print(json.dumps({"held_bytes": anonymous_bytes() - before, "peak_bytes": peak - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("backend", "fmt"), [("torch", "int4"), ("numpy", "int8")])
def test_loading_holds_little_more_than_the_experts_themselves(backend: str, fmt: str, tmp_path: Path) -> None:
    spec = FfnSpec(width=512, inner=1024)
    manifest, _ = encoded_split(tmp_path, fmt, spec, layers=1, experts=16, mapping={"near": [0], "far": range(16)})
    command = [sys.executable, "-c", MEASURED, str(tmp_path), backend, fmt]
    ran = subprocess.run(command, input=manifest.model_dump_json(), capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout)
    experts_bytes = 16 * expert_bytes(spec, "float32" if backend == "numpy" else fmt)
    assert experts_bytes / 2 < said["held_bytes"]
    largest_expert_bytes = expert_bytes(spec, "float32")
    assert said["peak_bytes"] < 1.1 * experts_bytes + 2 * largest_expert_bytes  # all of it twice would be 2
