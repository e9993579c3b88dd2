"""Reads a Hugging Face checkpoint under the names of the model's own modules, experts one at a time.

transformers' own mapping names and converts every key; it is documented for `from_pretrained`, but calling it is not,
so it is called in this file alone and pinned by the test over all families.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.auto import AutoHfQuantizer

from testbed.checkpoint.families import expert_parameters, experts_of, read_config
from testbed.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")
Source = tuple[str, Any]  # key in the files, pattern of the converter that takes it (None: a plain copy)


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that the index names: a folder may hold second copies in other formats."""
    index = directory / INDEX_NAME
    if not index.exists():
        names = {"model.safetensors"}
    else:
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files; download the model again") from error
    for name in sorted(names):
        if not (directory / name).resolve().is_relative_to(directory.resolve()) or not (directory / name).is_file():
            raise CheckpointError(f"{directory}: weight file {name} is missing; safetensors are needed, complete")
    return sorted(names)


class TensorFiles:
    """Tensors of a checkpoint by key, mapped and not read until asked for."""

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, Any] = {}
        for name in weight_files(directory):
            try:
                file: Any = safe_open(directory / name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{directory / name}: {error}; download it again") from error
            self._where |= dict.fromkeys(file.keys(), file)

    def keys(self) -> list[str]:
        return sorted(self._where, key=dot_natural_key)

    def tensor(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._where[key].get_tensor(key)
        return tensor

    def row(self, key: str, row: int) -> torch.Tensor:
        tensor: torch.Tensor = self._where[key].get_slice(key)[row]
        return tensor


class Checkpoint:
    """A checkpoint as its model sees it: `plain()` tensors stay at the base station, `expert()` goes to a node."""

    def __init__(self, directory: Path, model: Any) -> None:
        self._files = TensorFiles(directory)
        self._directory, self._model = directory, model
        self._meta = model.state_dict()
        mapping = get_model_conversion_mapping(model, hf_quantizer=_quantizer(directory))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._expert_targets = {
            f"{path}.{name}" for path, experts in experts_of(model).items() for name in expert_parameters(experts)
        }
        self._sources = self._plan()
        self._whole: dict[str, torch.Tensor] = {}

    def plain(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the model, tensor) of everything but the experts."""
        for target, sources in self._sources.items():
            if target not in self._expert_targets:
                yield target, self._fitting(target, self._convert(target, sources[None]), self._meta[target].shape)

    def expert(self, path: str, expert: int) -> dict[str, torch.Tensor]:
        """The parameters of one expert, by their name in the module. Experts are asked for layer by layer."""
        targets = {name: f"{path}.{name}" for name in expert_parameters(self._model.get_submodule(path))}
        return {
            name: self._fitting(target, self._expert_tensor(target, expert), self._meta[target].shape[1:])
            for name, target in targets.items()
        }

    def _fitting(self, target: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._directory}: {target} is {list(tensor.shape)} where config.json says {list(shape)}; "
                "download the model again"
            )
        return tensor

    def _plan(self) -> dict[str, dict[int | None, list[Source]]]:
        """Target -> expert (None: all at once) -> sources. Raises CheckpointError where keys and model do not match."""
        plan: dict[str, dict[int | None, list[Source]]] = defaultdict(lambda: defaultdict(list))
        left_over = []
        for key in self._files.keys():  # noqa: SIM118 - in natural order
            target, pattern = rename_source_key(
                key, self._renamings, self._converters, self._model.base_model_prefix, self._meta
            )
            if target not in self._meta and key in self._meta:
                target, pattern = key, None
            if target in self._meta:
                number = EXPERT_NUMBER.search(key) if target in self._expert_targets else None
                plan[target][int(number[1]) if number else None].append((key, pattern))
            elif not self._may_be_ignored(key):
                left_over.append(key)
        if left_over:
            raise CheckpointError(f"{self._directory}: {_some(left_over)}: tensors that this model has no place for")
        if missing := sorted(set(self._meta) - set(plan) - set(self._model.all_tied_weights_keys)):
            raise CheckpointError(f"{self._directory}: {_some(missing)}: tensors missing; download the model again")
        for target in self._expert_targets:
            count = len(self._meta[target])
            if set(plan[target]) not in ({None}, set(range(count))):
                raise CheckpointError(f"{self._directory}: {target}: not all {count} experts are in the files")
        return plan

    def _may_be_ignored(self, key: str) -> bool:
        ignored = [*(self._model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        return any(re.search(pattern, key) for pattern in ignored)

    def _convert(self, target: str, sources: list[Source]) -> torch.Tensor:
        key, pattern = sources[0]
        if pattern is None:
            return self._files.tensor(key)
        converter: Any = deepcopy(self._by_pattern[pattern])
        for key, pattern in sources:
            converter.add_tensor(target, key, pattern, self._files.tensor(key))
        try:
            converted = converter.convert(target, model=self._model, config=self._model.config)[target]
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(
                f"{self._directory}: {key} and its like give no {target} ({reason:.120}); is a tensor missing?"
            ) from error
        tensor: torch.Tensor = converted[0] if isinstance(converted, list) else converted
        return tensor

    def _expert_tensor(self, target: str, expert: int) -> torch.Tensor:
        sources = self._sources[target]
        if expert in sources:  # one entry per expert: the same converter, one expert at a time
            return self._convert(target, sources[expert])[0]
        stacked = sources[None]
        if len(stacked) == 1 and stacked[0][1] is None:
            return self._files.row(stacked[0][0], expert)
        if target not in self._whole:  # stacked and to be converted: a layer's tensors at a time
            layer = target.rpartition(".")[0]
            self._whole = {name: tensor for name, tensor in self._whole.items() if name.startswith(f"{layer}.")}
            self._whole[target] = self._convert(target, stacked)
        return self._whole[target][expert]


def _quantizer(directory: Path) -> Any:
    """What dequantises a quantised checkpoint; None for one that is not quantised."""
    quantised = getattr(read_config(directory), "quantization_config", None)
    if quantised is None:
        return None
    method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised.quant_method
    try:
        quantizer = AutoHfQuantizer.from_config(quantised, pre_quantized=True)
    except (ValueError, ImportError, NotImplementedError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: quantised with {method}: {error!s:.120}; use one in bf16") from error
    if not hasattr(quantizer.quantization_config, "dequantize"):
        raise CheckpointError(f"{directory}: quantised with {method}, which cannot be dequantised; use one in bf16")
    quantizer.quantization_config.dequantize = True
    return quantizer


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
