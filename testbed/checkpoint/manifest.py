"""The manifest of a split checkpoint: what the layers are, who holds what, and the sha256 of every file.

It is JSON, and it may come from another machine: it is validated before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.stored_formats import WeightFormat
from testbed.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
BS_NAME = "bs.safetensors"
MAX_MANIFEST_BYTES = 64 * 2**20

Dtype = Literal["float32", "float16", "bfloat16"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
DeviceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]  # never a path


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    bytes: int = Field(ge=0)


class Layer(BaseModel):
    """One MoE layer. `index` counts MoE layers in the order of the forward pass; `path` is its experts module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int = Field(ge=0, lt=2**16)
    path: str = Field(min_length=1, max_length=256)
    experts: int = Field(ge=1, le=2**15)
    top_k: int = Field(ge=1)
    spec: FfnSpec


class Manifest(BaseModel):
    """See the module's docstring. `placement[layer][expert]` names the devices that hold the expert."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: Literal[1] = 1
    model_name: str = Field(min_length=1, max_length=256)  # OWNER/NAME on the hub, or that of its folder
    hub_commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = None  # None: it was a folder
    model_type: str = Field(min_length=1, max_length=128)
    model_hash: Sha256  # config and every tensor (name, dtype, shape, crc32): the same for every placement of a model
    source_hash: Sha256  # config, tokenizer and the weights' headers that the split was made from
    dtype: Dtype  # of the experts' weights, as stored where `weight_format` says nothing else
    devices: tuple[DeviceName, ...] = Field(min_length=1)
    layers: tuple[Layer, ...] = Field(min_length=1)
    placement: tuple[tuple[tuple[DeviceName, ...], ...], ...]
    files: dict[FileName, FileEntry]
    weight_format: dict[DeviceName, WeightFormat] = {}  # of a device's shard; see `stored_formats.format_of`

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Manifest:
        if [layer.index for layer in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers are not numbered 0, 1, 2, ...")
        if [len(row) for row in self.placement] != [layer.experts for layer in self.layers]:
            raise ValueError("placement does not name every expert of every layer once")
        holders = [devices for row in self.placement for devices in row]
        if not all(holders) or not {d for devices in holders for d in devices} <= set(self.devices):
            raise ValueError("placement leaves an expert without device, or names an unknown device")
        if missing := {BS_NAME, *map(shard_name, self.devices)} - set(self.files):
            raise ValueError(f"no sha256 for {min(missing)}")
        if not set(self.weight_format) <= set(self.devices):
            raise ValueError("weight_format names an unknown device")
        return self

    def layer_at(self, path: str) -> Layer:
        """The layer of an experts module. Raises CheckpointError where the split has none at this path."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise CheckpointError(f"the split of {self.model_name} has no experts at {path}; split this model again")

    def held_by(self, device: str) -> Iterator[tuple[int, int]]:
        """(layer, expert) of every expert on a device, ascending."""
        for layer, row in enumerate(self.placement):
            for expert, holders in enumerate(row):
                if device in holders:
                    yield layer, expert

    def held_counts(self, device: str) -> list[int]:
        """Experts on a device per layer: what its HELLO says."""
        return [sum(device in holders for holders in row) for row in self.placement]

    def holds_NE(self, layer: int) -> NDArray[np.bool_]:
        """holds_NE[n, e]: device n, in the order of `devices`, holds expert e of the layer."""
        return np.array([[device in holders for holders in self.placement[layer]] for device in self.devices], bool)


def shard_name(device: str) -> str:
    """File name of a node's shard."""
    return f"node-{device}.safetensors"


def manifest_hash(manifest: Manifest) -> str:
    """sha256 of the canonical JSON: what HELLO carries, so that both sides speak of the same split."""
    canonical = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a split. Raises CheckpointError, one line, for a file that is missing or not a manifest."""
    path = Path(directory) / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, not a manifest")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; split the model into this folder first") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise CheckpointError(f"{path}: {where}: {first['msg']}; split the model again") from error


def file_entry(path: Path) -> FileEntry:
    """sha256 and size of a file, read in pieces."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def verify_file(directory: Path, name: str, manifest: Manifest) -> Path:
    """The path of a file of the split, once its bytes are those of the manifest. Raises CheckpointError."""
    path = Path(directory) / name
    if name not in manifest.files:
        raise CheckpointError(f"{path}: the manifest names no such file; is the device one of the split?")
    want = manifest.files[name]
    try:
        found = file_entry(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; copy it again from where the model was split") from error
    if found != want:
        raise CheckpointError(
            f"{path}: sha256 {found.sha256[:12]} ({found.bytes} bytes) is not the manifest's {want.sha256[:12]} "
            f"({want.bytes} bytes); copy it again from where the model was split"
        )
    return path
