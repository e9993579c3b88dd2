"""A node's shard: a safetensors file, mapped and read tensor by tensor, so that it is never in memory twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from testbed.checkpoint.ffn import FfnSpec, tensor_name
from testbed.checkpoint.stored_formats import Stored, stored_tensors
from testbed.errors import CheckpointError

NUMPY_DTYPES: dict[str, type[np.generic]] = {
    **{"F32": np.float32, "F16": np.float16, "BF16": np.uint16},  # numpy knows no bfloat16: its bits
    **{"I8": np.int8, "U8": np.uint8},
}


class Shard:
    """Tensors by name, as the file has them. Arrays are views of the mapped file: copy what must outlive it."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is missing or no safetensors file."""
        self._path = path
        try:
            with safe_open(path, framework="numpy"):  # checks header, sizes and offsets
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
            self._bytes = np.memmap(path, np.uint8, "c", offset=8 + length)  # "c": torch warns of what is read-only
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error!s:.200}; split the model again") from error
        header.pop("__metadata__", None)
        self._tensors = {name: Stored(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        self._spans = {name: entry["data_offsets"] for name, entry in header.items()}

    def check(self, specs: Mapping[tuple[int, int], FfnSpec], fmt: str) -> None:
        """Raises CheckpointError unless every expert's tensors are here, in the shapes and types of the format."""
        for (layer, expert), spec in specs.items():
            for part, wanted in stored_tensors(spec, fmt).items():
                name = tensor_name(layer, expert, part)
                if (found := self._tensors.get(name)) != wanted:
                    said = f"{name} is {_told(found)} instead of {_told(wanted)}"
                    raise CheckpointError(f"{self._path}: {said}; split the model again")

    def expert(self, layer: int, expert: int, spec: FfnSpec, fmt: str) -> dict[str, NDArray[Any]]:
        """What is stored of an expert, by part; bfloat16 as uint16."""
        return {part: self._array(tensor_name(layer, expert, part)) for part in stored_tensors(spec, fmt)}

    def _array(self, name: str) -> NDArray[Any]:
        (shape, dtype), (begin, end) = self._tensors[name], self._spans[name]
        array: NDArray[Any] = np.asarray(self._bytes[begin:end]).view(NUMPY_DTYPES[dtype]).reshape(shape)
        return array

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        del self._bytes  # the mapping goes with the last view of it


def _told(tensor: Stored | None) -> str:
    return "not there" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
