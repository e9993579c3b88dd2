"""Splits a Hugging Face MoE checkpoint into what the base station loads and one shard of experts per device."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from testbed.checkpoint.check import check_layer
from testbed.checkpoint.conversion import Checkpoint, weight_files
from testbed.checkpoint.families import DTYPES, canonical, describe, empty_model, experts_of, top_k_of
from testbed.checkpoint.ffn import tensor_name
from testbed.checkpoint.manifest import (
    BS_NAME,
    MANIFEST_NAME,
    Dtype,
    Layer,
    Manifest,
    file_entry,
    load_manifest,
    shard_name,
    verify_file,
)
from testbed.checkpoint.placement import Placement, place
from testbed.checkpoint.shard_writer import ShardWriter
from testbed.errors import CheckpointError

COPIED = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "chat_template*", "*.model"),
)
Progress = Callable[[int, int], None]


def split(
    model_dir: Path,
    out_dir: Path,
    devices: Sequence[str],
    *,
    placement: Mapping[str, Sequence[int]] | None = None,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Splits the checkpoint in `model_dir` into `out_dir` and returns the manifest.

    placement: device -> experts (see `placement.place`). dtype: of the experts as stored; the checkpoint's if None.
    progress: called with (experts written, experts in all). `out_dir` appears complete or not at all. One that exists
    is returned, once every byte is checked, if it is this very split. Raises CheckpointError if it is another one, and
    for a folder that is no MoE checkpoint which transformers' experts interface can take apart.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir}: no config.json; give the folder of a Hugging Face checkpoint")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: weights are stored in {', '.join(DTYPES)}")
    job = _Job.of(model_dir, devices, placement, dtype)
    if out_dir.is_dir() and any(out_dir.iterdir()):
        return _existing(out_dir, job)
    try:
        return _write_at_once(job, out_dir, progress)
    except OSError as error:
        raise CheckpointError(f"{out_dir}: {error.strerror or error}; nothing was written there") from error


def _write_at_once(job: _Job, out_dir: Path, progress: Progress | None) -> Manifest:
    """Writes beside `out_dir` and renames: it is complete, also after a power cut, or not there."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        manifest = _write(job, partial, progress)
        partial.chmod(0o755)
        partial.rename(out_dir)
        _sync(out_dir.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Job:
    """What is to be split, and where each expert goes."""

    model_dir: Path
    model: Any  # its parameters on the meta device
    layers: tuple[Layer, ...]
    devices: tuple[str, ...]
    placement: Placement
    dtype: Dtype | None
    source_hash: str

    @classmethod
    def of(
        cls, model_dir: Path, devices: Sequence[str], mapping: Mapping[str, Sequence[int]] | None, dtype: Dtype | None
    ) -> _Job:
        model = empty_model(model_dir, torch.float32, "eager")
        layers = tuple(
            Layer(index=i, path=path, experts=m.num_experts, top_k=top_k_of(model, path), spec=describe(m))
            for i, (path, m) in enumerate(experts_of(model).items())
        )
        if not layers:
            raise CheckpointError(
                f"{model_dir}: {model.config.model_type} has no experts behind transformers' experts interface; "
                "use a mixture-of-experts model of a family that has (Mixtral, Qwen-MoE, DeepSeek, ...)"
            )
        placement = place([layer.experts for layer in layers], devices, mapping)
        source_hash = _source_hash(model_dir, dtype)
        return cls(model_dir, model, layers, tuple(devices), placement, dtype, source_hash)

    def experts(self) -> Iterator[tuple[Layer, int, tuple[str, ...]]]:
        """(layer, expert, its devices) in the order in which shards store them."""
        for layer, row in zip(self.layers, self.placement, strict=True):
            for expert, holders in enumerate(row):
                yield layer, expert, holders


def _existing(out_dir: Path, job: _Job) -> Manifest:
    manifest = load_manifest(out_dir)
    theirs = (manifest.source_hash, manifest.devices, manifest.placement)
    if theirs != (job.source_hash, job.devices, job.placement):
        raise CheckpointError(f"{out_dir}: holds another model or placement; name another folder, or remove this one")
    for name in manifest.files:
        verify_file(out_dir, name, manifest)
    return manifest


def _write(job: _Job, out: Path, progress: Progress | None) -> Manifest:
    checkpoint = Checkpoint(job.model_dir, job.model)
    dtype = job.dtype or _stored_dtype(checkpoint, job.layers[0])
    digests = _write_shards(job, out, checkpoint, DTYPES[dtype], progress) | _write_base_station(out, checkpoint)
    for path in _copied(job.model_dir):
        shutil.copyfile(path, out / path.name)
    manifest = Manifest(
        model_name=job.model_dir.resolve().name,
        model_type=job.model.config.model_type,
        model_hash=_digest(sorted(digests.items()), (job.model_dir / "config.json").read_bytes()),
        source_hash=job.source_hash,
        dtype=dtype,
        devices=job.devices,
        layers=job.layers,
        placement=job.placement,
        files={path.name: file_entry(path) for path in sorted(out.iterdir())},
    )
    (out / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")
    for path in (*out.iterdir(), out):
        _sync(path)
    return manifest


def _stored_dtype(checkpoint: Checkpoint, layer: Layer) -> Dtype:
    dtypes = [tensor.dtype for tensor in checkpoint.expert(layer.path, 0).values()]
    found = reduce(torch.promote_types, dtypes)
    for name, dtype in DTYPES.items():
        if dtype == found:
            return name
    raise CheckpointError(f"{layer.path}: experts stored as {found}; use a checkpoint in {', '.join(DTYPES)}")


def _write_shards(
    job: _Job, out: Path, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress | None
) -> dict[str, str]:
    """Writes one shard per device, expert by expert, so that memory stays at one; returns tensor name -> digest."""
    digests: dict[str, str] = {}
    every = list(job.experts())
    with ExitStack() as stack:
        writers = {
            device: stack.enter_context(ShardWriter(out / shard_name(device), _shapes(job, device), dtype))
            for device in job.devices
        }
        for done, (layer, expert, holders) in enumerate(every, start=1):
            for part, tensor in _read_expert(job, checkpoint, layer, expert).items():
                name, stored = tensor_name(layer.index, expert, part), _cast(tensor, dtype, layer, job)
                digests[name] = _tensor_digest(stored)
                for device in holders:
                    writers[device].add(name, stored)
            if progress:
                progress(done, len(every))
    return digests


def _shapes(job: _Job, device: str) -> dict[str, tuple[int, ...]]:
    return {
        tensor_name(layer.index, expert, part): shape
        for layer, expert, holders in job.experts()
        if device in holders
        for part, shape in layer.spec.shapes().items()
    }


def _read_expert(job: _Job, checkpoint: Checkpoint, layer: Layer, expert: int) -> dict[str, torch.Tensor]:
    """One expert in canonical form; the first of every layer is also run through the model's own class."""
    module, weights = job.model.get_submodule(layer.path), checkpoint.expert(layer.path, expert)
    if expert == 0:
        check_layer(layer.path, module, weights, layer.spec)
    tensors = canonical(module, weights)
    return {part: tensors[part] for part in layer.spec.shapes()}


def _cast(tensor: torch.Tensor, dtype: torch.dtype, layer: Layer, job: _Job) -> torch.Tensor:
    if job.dtype is None and torch.promote_types(tensor.dtype, dtype) != dtype:
        raise CheckpointError(f"{layer.path}: {tensor.dtype} among weights of {dtype}; say which dtype to store")
    return tensor.to(dtype)


def _write_base_station(out: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes everything but the experts, in the dtype of the checkpoint; returns tensor name -> digest."""
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in checkpoint.plain()}
    save_file(tensors, out / BS_NAME, metadata={"format": "pt"})
    return {name: _tensor_digest(tensor) for name, tensor in tensors.items()}


def _tensor_digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return _digest([str(tensor.dtype), list(tensor.shape)], raw.data)


def _digest(described: Any, raw: bytes | memoryview) -> str:
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(raw)
    return digest.hexdigest()


def _copied(model_dir: Path) -> list[Path]:
    """What the base station needs beside the weights: config, tokenizer, generation settings."""
    return sorted({path for pattern in COPIED for path in model_dir.glob(pattern) if path.is_file()})


def _source_hash(model_dir: Path, dtype: str | None) -> str:
    names = {path.name for path in _copied(model_dir)} | set(weight_files(model_dir))
    return _digest([[name, file_entry(model_dir / name).sha256] for name in sorted(names)] + [dtype], b"")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
