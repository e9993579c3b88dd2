from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import write_split

from jetson_node.experts import Experts, ffn_numpy, make_experts
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import file_entry
from testbed.errors import CheckpointError, MessageError

SPEC = FfnSpec(width=8, inner=12)


def random_rows(rows: int) -> Any:
    return np.random.default_rng(1).standard_normal((rows, SPEC.width)).astype(np.float32)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_rows_of_several_experts_come_back_in_the_order_of_the_segments(backend: Any, tmp_path: Path) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    manifest, weights = write_split(tmp_path, SPEC)
    experts = make_experts(tmp_path, manifest, "far", backend=backend)
    x_RD = random_rows(6)
    experts.warm_up()
    out_RD = experts.compute(1, [(3, 4), (1, 2)], x_RD)
    expected = [ffn_numpy(x_RD[:4], weights[1, 3], SPEC), ffn_numpy(x_RD[4:], weights[1, 1], SPEC)]
    np.testing.assert_allclose(out_RD, np.concatenate(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_torch_computes_in_the_dtype_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    manifest, weights = write_split(tmp_path, SPEC)
    experts = make_experts(tmp_path, manifest, "far", backend="torch", dtype="bfloat16")
    x_RD = random_rows(6)
    out_RD = experts.compute(0, [(1, 6)], x_RD)
    error = np.abs(out_RD - ffn_numpy(x_RD, weights[0, 1], SPEC)).max()
    assert 0 < error < 0.1
    with pytest.raises(CheckpointError, match="dtype 'int3'"):
        make_experts(tmp_path, manifest, "far", backend="torch", dtype="int3")


@pytest.fixture
def held_by_far(tmp_path: Path) -> Experts:
    manifest, _ = write_split(tmp_path, SPEC)
    return make_experts(tmp_path, manifest, "far", backend="numpy")  # holds experts 1 and 3


@pytest.mark.parametrize(
    ("layer", "segments", "shape", "words"),
    [
        (0, [[0, 6]], (6, 8), "expert 0 is not on this device"),
        (2, [[1, 6]], (6, 8), "layer 2: expert 1 is not"),
        (0, [[1, 3], [1, 3]], (6, 8), "two segments"),
        (0, [[1, 5]], (6, 8), "segments of 5 rows for a block of 6"),
        (0, [[1, 6]], (6, 7), "rows of 7, expected 8"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(
    held_by_far: Experts, layer: int, segments: Any, shape: tuple[int, int], words: str
) -> None:
    with pytest.raises(MessageError, match=words):
        held_by_far.check(layer, segments, *shape)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_shard_without_one_of_its_tensors_is_refused_by_name(backend: Any, tmp_path: Path) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    wrong, _ = write_split(tmp_path, SPEC)
    more = wrong.model_copy(update={"placement": ((("near", "far"), *wrong.placement[0][1:]), wrong.placement[1])})
    with pytest.raises(CheckpointError, match=r"node-far.safetensors: 0.0.gate_up is not there"):
        make_experts(tmp_path, more, "far", backend=backend)


def test_a_damaged_shard_is_refused_before_it_is_read(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    shard = tmp_path / "node-far.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"node-far.safetensors: sha256"):
        make_experts(tmp_path, manifest, "far", backend="numpy")


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_file_that_is_no_safetensors_is_refused_in_one_line(backend: Any, tmp_path: Path) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    manifest, _ = write_split(tmp_path, SPEC)
    shard = tmp_path / "node-far.safetensors"
    shard.write_bytes(b"not a shard at all")
    files = {**manifest.files, shard.name: file_entry(shard)}
    with pytest.raises(CheckpointError, match="split the model again"):
        make_experts(tmp_path, manifest.model_copy(update={"files": files}), "far", backend=backend)


def test_without_torch_a_node_computes_in_numpy_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert make_experts(tmp_path, manifest, "far").backend == "numpy float32"
    with pytest.raises(CheckpointError, match="torch is not installed"):
        make_experts(tmp_path, manifest, "far", backend="torch")
