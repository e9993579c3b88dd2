"""What a split will write, known from config and headers alone: which tensor goes into which file, and its size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError

from testbed.checkpoint.check import check_layer
from testbed.checkpoint.conversion import Checkpoint
from testbed.checkpoint.families import DTYPES, describe, empty_model, experts_of, top_k_of
from testbed.checkpoint.ffn import tensor_name
from testbed.checkpoint.manifest import BS_NAME, Dtype, Layer, file_entry, shard_name
from testbed.checkpoint.own_code import CODE, allow_own_code
from testbed.checkpoint.placement import Held, Placement, place
from testbed.checkpoint.shard_writer import file_bytes
from testbed.checkpoint.stored_formats import WeightFormat, expert_bytes
from testbed.checkpoint.tensor_files import header_digest, weight_files
from testbed.checkpoint.weight_formats import encoded_shapes
from testbed.errors import CheckpointError

COPIED = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "chat_template*", "*.model"),
)
Step = tuple[Layer, int, tuple[str, ...]] | str  # an expert and its devices, or a tensor of the base station


@dataclass(frozen=True)
class Source:
    """A checkpoint looked at and not read. Raises CheckpointError for one that nodes could not compute."""

    model_dir: Path
    name: str  # OWNER/NAME on the hub, or that of the folder
    commit: str | None  # on the hub
    has_own_code: bool
    model: Any  # its parameters on the meta device
    layers: tuple[Layer, ...]
    checkpoint: Checkpoint

    @classmethod
    def of(
        cls, model_dir: Path, *, name: str | None = None, commit: str | None = None, trusted: str | None = None
    ) -> Source:
        """trusted: the name of the model whose own code may run."""
        if not (model_dir / "config.json").is_file():
            raise CheckpointError(f"{model_dir}: no config.json; give the folder of a Hugging Face checkpoint")
        name = name or model_dir.resolve().name or "model"
        has_own_code = allow_own_code(model_dir, name, trusted)
        try:
            model = empty_model(model_dir, torch.float32, "eager")
        except StrictDataclassError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{model_dir / 'config.json'}: {reason:.200}; download it again") from error
        modules = experts_of(model)
        if not modules:
            raise CheckpointError(
                f"{model_dir}: {model.config.model_type} has no experts behind transformers' experts interface; "
                "use a mixture-of-experts model of a family that has (Mixtral, Qwen-MoE, DeepSeek, ...)"
            )
        try:
            layers = tuple(
                Layer(index=i, path=path, experts=m.num_experts, top_k=top_k_of(model, path), spec=describe(m))
                for i, (path, m) in enumerate(modules.items())
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{model_dir / 'config.json'}: {where} {first['input']}: {first['msg']}") from error
        checkpoint = Checkpoint(model_dir, model)
        for layer in layers:
            if layer.top_k > layer.experts:
                raise CheckpointError(
                    f"{model_dir / 'config.json'}: a gate that picks {layer.top_k} of {layer.experts} experts; "
                    "download it again"
                )
            check_layer(layer.path, modules[layer.path], layer.spec)
        return cls(model_dir, name, commit, has_own_code, model, layers, checkpoint)

    @property
    def experts_per_layer(self) -> list[int]:
        return [layer.experts for layer in self.layers]

    @cached_property
    def stored_dtype(self) -> Dtype:
        """What the experts are stored as, in every layer. Raises CheckpointError where that is not one float dtype."""
        found = [self.checkpoint.expert_dtype(layer.path) for layer in self.layers]
        widest = reduce(torch.promote_types, found)
        for layer, dtype in zip(self.layers, found, strict=True):
            if dtype != widest:
                raise CheckpointError(f"{layer.path}: {dtype} among weights of {widest}; say which dtype to store")
        for name, dtype in DTYPES.items():
            if dtype == widest:
                return name
        raise CheckpointError(
            f"{self.layers[0].path}: experts stored as {widest}; use a checkpoint in {', '.join(DTYPES)}"
        )

    @cached_property
    def plain_entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.checkpoint.plain_entries()

    def expert_bytes(self, weight_format: str) -> list[int]:
        """Bytes of one expert of each layer."""
        return [expert_bytes(layer.spec, weight_format) for layer in self.layers]

    def copied(self) -> list[Path]:
        """What the base station needs beside the weights: config, tokenizer, generation settings, the model's code."""
        patterns = (*COPIED, CODE) if self.has_own_code else COPIED
        return sorted({path for pattern in patterns for path in self.model_dir.glob(pattern) if path.is_file()})

    @property
    def has_tokenizer(self) -> bool:
        return any(path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in self.copied())

    def digest(self) -> str:
        """Of the small files' content, and of the names, sizes and headers of the weights."""
        weights = [[name, (self.model_dir / name).stat().st_size, header_digest(self.model_dir / name)]
                   for name in weight_files(self.model_dir)]  # fmt: skip
        return _digest([weights, [[path.name, file_entry(path).sha256] for path in self.copied()]])


@dataclass(frozen=True)
class SplitJob:
    """What is to be split, and where each expert goes."""

    source: Source
    devices: tuple[str, ...]
    placement: Placement
    dtype: Dtype
    weight_formats: Mapping[str, WeightFormat]

    @classmethod
    def of(
        cls,
        source: Source,
        devices: Sequence[str],
        mapping: Mapping[str, Held] | None = None,
        dtype: Dtype | None = None,
        weight_formats: Mapping[str, WeightFormat] | None = None,
    ) -> SplitJob:
        """Raises ConfigError for a placement that cannot work, CheckpointError for a dtype that is none."""
        if dtype is not None and dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r}: weights are stored in {', '.join(DTYPES)}")
        placement = place(source.experts_per_layer, devices, mapping)
        return cls(source, tuple(devices), placement, dtype or source.stored_dtype, dict(weight_formats or {}))

    def weight_format(self, device: str) -> WeightFormat:
        return self.weight_formats.get(device, self.dtype)

    def experts(self) -> Iterator[tuple[Layer, int, tuple[str, ...]]]:
        """(layer, expert, its devices) in the order in which shards store them."""
        for layer, row in zip(self.source.layers, self.placement, strict=True):
            for expert, holders in enumerate(row):
                yield layer, expert, holders

    def steps(self) -> Iterator[Step]:
        """In the order of writing, the same every time."""
        yield from self.source.plain_entries
        yield from self.experts()

    @cached_property
    def entries(self) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """File name -> tensor name -> (shape, dtype)."""
        shards: dict[str, dict[str, Any]] = {device: {} for device in self.devices}
        for layer, expert, holders in self.experts():
            for device in holders:
                for part, entry in encoded_shapes(layer.spec, self.weight_format(device)).items():
                    shards[device][tensor_name(layer.index, expert, part)] = entry
        return {BS_NAME: self.source.plain_entries} | {shard_name(d): shards[d] for d in self.devices}

    def bytes_of(self, file_name: str) -> int:
        return file_bytes(self.entries[file_name])

    @cached_property
    def total_bytes(self) -> int:
        return sum(map(self.bytes_of, self.entries))

    @cached_property
    def source_hash(self) -> str:
        return self.source.digest()

    def identity(self) -> str:
        """Of this very job on these very files, so that what another one has begun is not gone on with."""
        folder = self.source.model_dir
        stamps = [(folder / name).stat().st_mtime_ns for name in weight_files(folder)]
        formats = sorted(self.weight_formats.items())
        return _digest([self.source_hash, stamps, self.devices, self.placement, self.dtype, formats])

    def model_hash(self, checksums: Mapping[str, int]) -> str:
        """checksums: tensor name -> crc32 of its bytes in `dtype`; an expert's under its name in a shard."""
        shapes = {name: [str(dtype), list(shape)] for name, (shape, dtype) in self.source.plain_entries.items()}
        for layer, expert, _ in self.experts():
            for part, shape in layer.spec.shapes().items():
                shapes[tensor_name(layer.index, expert, part)] = [self.dtype, list(shape)]
        config = (self.source.model_dir / "config.json").read_bytes()
        return _digest([sorted((name, *shapes[name], checksum) for name, checksum in checksums.items()), config.hex()])


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
