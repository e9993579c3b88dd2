"""The safetensors files of a checkpoint: what headers say, and tensors, mapped and not read until asked for."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import dot_natural_key

from testbed.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
MAP_NORESERVE = 0x4000  # as Linux has it; Python names it from 3.13 on
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def weight_file_names(directory: Path) -> list[str]:
    """The safetensors files that the index names: a folder may hold second copies in other formats."""
    index = directory / INDEX_NAME
    if not index.exists():
        return [ONE_FILE]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files; download the model again") from error


def weight_files(directory: Path) -> list[str]:
    """`weight_file_names`, all of them there and inside the folder. Raises CheckpointError."""
    names = weight_file_names(directory)
    for name in names:
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()  # links may lead out: the hub's cache
        if not inside or not (directory / name).is_file():
            raise CheckpointError(f"{directory}: weight file {name} is missing; safetensors are needed, complete")
    return names


def header_digest(path: Path) -> str:
    """sha256 of a safetensors file's header: names, dtypes and shapes of its tensors."""
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        return hashlib.sha256(file.read(length)).hexdigest()


class TensorFiles:
    """Tensors of a checkpoint by key."""

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, _MappedFile] = {}
        for name in weight_files(directory):
            file = _MappedFile(directory / name)
            self._where |= dict.fromkeys(file.header, file)

    def keys(self) -> list[str]:
        return sorted(self._where, key=dot_natural_key)

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self._where[key].header[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Raises CheckpointError for a number format that torch does not know."""
        name = self._where[key].header[key]["dtype"]
        if name not in DTYPES_BY_NAME:
            raise CheckpointError(f"{key}: stored as {name}; use a checkpoint in bf16")
        return DTYPES_BY_NAME[name]

    def tensor(self, key: str) -> torch.Tensor:
        raw, dtype = self._where[key].raw(key), self.dtype(key)
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(self.shape(key))

    def row(self, key: str, row: int) -> torch.Tensor:
        return self.tensor(key)[row]


class _MappedFile:
    """A safetensors file of any size: mapped without asking for as much memory, which `safe_open` does for torch."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy"):
                pass  # its header is sound, and the file as long as that says
            with path.open("rb") as file:
                mapped = mmap.mmap(
                    file.fileno(), 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error!s:.200}; download it again") from error
        self._begin = 8 + int.from_bytes(mapped[:8], "little")
        self.header: dict[str, dict[str, Any]] = json.loads(mapped[8 : self._begin])
        self.header.pop("__metadata__", None)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def raw(self, key: str) -> torch.Tensor:
        begin, end = self.header[key]["data_offsets"]
        return self._bytes[self._begin + begin : self._begin + end]
