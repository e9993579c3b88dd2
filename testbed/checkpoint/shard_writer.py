"""Writes a safetensors file tensor by tensor, so that a shard need not fit in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class ShardWriter:
    """`shapes` says beforehand what will come, in this order, all of one dtype."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._expected = iter(shapes.items())
        self._dtype = dtype
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format asks for tensors at multiples of eight bytes
        self._file: BinaryIO = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor. Raises ValueError for one that was not announced here."""
        if (name, tuple(tensor.shape)) != next(self._expected, None):
            raise ValueError(f"{name} {list(tensor.shape)} is not the tensor that comes next")
        self._file.write(tensor.to(self._dtype).contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and (missing := next(self._expected, None)):
            raise ValueError(f"{missing[0]} was announced and not written")
