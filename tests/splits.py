"""A small split written by hand: shards of random experts, without torch and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from testbed.checkpoint.ffn import FfnSpec, tensor_name
from testbed.checkpoint.manifest import BS_NAME, MANIFEST_NAME, Layer, Manifest, file_entry, shard_name
from testbed.checkpoint.placement import place

DEVICES = ("near", "far")


def random_weights(spec: FfnSpec, rng: np.random.Generator, scale: float = 0.3) -> dict[str, np.ndarray[Any, Any]]:
    return {part: (scale * rng.standard_normal(shape)).astype(np.float32) for part, shape in spec.shapes().items()}


def write_split(
    directory: Path,
    spec: FfnSpec,
    *,
    devices: Sequence[str] = DEVICES,
    layers: int = 2,
    experts: int = 4,
    mapping: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Manifest, dict[tuple[int, int], dict[str, np.ndarray[Any, Any]]]]:
    """Writes the folder; returns its manifest and the weights by (layer, expert)."""
    rng = np.random.default_rng(0)
    weights = {(layer, expert): random_weights(spec, rng) for layer in range(layers) for expert in range(experts)}
    placement = place([experts] * layers, devices, mapping)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"embedding": np.zeros((4, spec.width), np.float32)}, directory / BS_NAME)
    for device in devices:
        held = {
            tensor_name(layer, expert, part): array
            for (layer, expert), parts in weights.items()
            if device in placement[layer][expert]
            for part, array in parts.items()
        }
        save_file(held, directory / shard_name(device))
    manifest = Manifest(
        model_name="by hand",
        model_type="none",
        model_hash="0" * 64,
        source_hash="0" * 64,
        dtype="float32",
        devices=tuple(devices),
        layers=tuple(Layer(index=i, path=f"l.{i}.experts", experts=experts, top_k=2, spec=spec) for i in range(layers)),
        placement=placement,
        files={path.name: file_entry(path) for path in directory.glob("*.safetensors")},
    )
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest, weights
