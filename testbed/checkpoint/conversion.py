"""Reads a Hugging Face checkpoint under the names of the model's own modules, experts one at a time.

transformers' own mapping names and converts every key; it is documented for `from_pretrained`, but calling it is not,
so it is called in this file alone and pinned by the test over all families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from testbed.checkpoint.dequantising import SCALE_SUFFIX, Dequantiser
from testbed.checkpoint.families import expert_parameters, experts_of
from testbed.checkpoint.tensor_files import TensorFiles
from testbed.errors import CheckpointError

EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")
Source = tuple[str, Any]  # key in the files, pattern of the converter that takes it (None: a plain copy)


class Checkpoint:
    """A checkpoint as its model sees it: `plain` tensors stay at the base station, experts go to nodes.

    What can be told from the files' headers is checked when it is made. Raises CheckpointError.
    """

    def __init__(self, directory: Path, model: Any) -> None:
        self._files = TensorFiles(directory)
        self._directory, self._model = directory, model
        self._meta = model.state_dict()
        self._dequantiser = Dequantiser(directory)
        mapping = get_model_conversion_mapping(model, hf_quantizer=self._dequantiser.quantizer)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._expert_targets = {
            f"{path}.{name}" for path, experts in experts_of(model).items() for name in expert_parameters(experts)
        }
        self._sources = self._plan()
        self._check_scales()
        self._check_shapes()
        self._whole: dict[str, torch.Tensor] = {}
        self._converted_dtypes: dict[tuple[Any, ...], torch.dtype] = {}

    def plain_entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name in the model -> (shape, dtype as stored) of everything but the experts."""
        return {
            target: (tuple(self._meta[target].shape), self._dtype(target, sources[None]))
            for target, sources in self._sources.items()
            if target not in self._expert_targets
        }

    def plain(self, target: str) -> torch.Tensor:
        return self._fitting(target, self._convert(target, self._sources[target][None]), self._meta[target].shape)

    def expert_dtype(self, path: str) -> torch.dtype:
        """What the parameters of a layer's experts are stored as; the wider one where they differ."""
        targets = [f"{path}.{name}" for name in expert_parameters(self._model.get_submodule(path))]
        return reduce(
            torch.promote_types, [self._dtype(target, next(iter(self._sources[target].values()))) for target in targets]
        )

    def expert(self, path: str, expert: int) -> dict[str, list[torch.Tensor]]:
        """The parameters of one expert by their name in the module, each in pieces to be joined along the first axis.

        Experts are asked for layer by layer.
        """
        targets = {name: f"{path}.{name}" for name in expert_parameters(self._model.get_submodule(path))}
        return {name: self._expert_pieces(target, expert) for name, target in targets.items()}

    def _fitting(self, target: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        self._check_shape(target, tensor.shape, shape)
        return tensor

    def _check_shape(self, target: str, found: torch.Size, shape: torch.Size) -> None:
        if found != shape:
            raise CheckpointError(
                f"{self._directory}: {target} is {list(found)} where config.json says {list(shape)}; "
                "download the model again"
            )

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
            count, numbers = len(self._meta[target]), [number for number in plan[target] if number is not None]
            if set(plan[target]) not in ({None}, set(range(count))):
                raise CheckpointError(
                    f"{self._directory}: {target}: config.json says {count} experts, the files hold {len(numbers)} "
                    f"({min(numbers)} to {max(numbers)}); download the model again"
                )
        return plan

    def _check_scales(self) -> None:
        for by_expert in self._sources.values():
            for sources in by_expert.values():
                patterns = {pattern for _, pattern in sources}
                for key, pattern in sources:
                    self._dequantiser.check_scale(key, pattern, self._files.dtype(key), patterns)

    def _check_shapes(self) -> None:
        """From headers alone: the shape of every tensor that is stored as it is or only joined."""
        for target, by_expert in self._sources.items():
            whole = self._meta[target].shape
            for expert, sources in by_expert.items():
                if sources[0][1] is None:
                    self._check_shape(target, self._files.shape(sources[0][0]), whole)
                elif expert is not None and (keys := self._joined(sources)):
                    shapes = [self._files.shape(key) for key in keys]
                    rows = sum(shape[0] for shape in shapes) if all(shapes) else 0
                    self._check_shape(target, torch.Size([rows, *shapes[0][1:]]), whole[1:])

    def _may_be_ignored(self, key: str) -> bool:
        ignored = [*(self._model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        return any(re.search(pattern, key) for pattern in ignored)

    def _joined(self, sources: list[Source]) -> list[str]:
        """Keys whose tensors, one after the other, are the parameter of one expert; empty where there is more to do.

        That spares copies: a file's tensors can be written as they are.
        """
        converter: Any = self._by_pattern[sources[0][1]]
        operations = converter.operations
        merges = bool(operations) and type(operations[0]) is MergeModulelist and operations[0].dim == 0
        joins = [type(operation) is Concatenate and operation.dim == 1 for operation in operations[1:]]
        if not merges or joins not in ([], [True]):
            return []
        keys = {pattern: key for key, pattern in sources}
        if len(keys) < len(sources):
            return []
        if missing := [pattern for pattern in converter.source_patterns if pattern not in keys]:
            raise CheckpointError(
                f"{self._directory}: beside {sources[0][0]} there is no {missing[0]}: is a tensor missing? "
                "download the model again"
            )
        return [keys[pattern] for pattern in converter.source_patterns]

    def _dtype(self, target: str, sources: list[Source]) -> torch.dtype:
        """From headers where nothing is converted; else one tensor of its kind is converted, once."""
        stored = [self._files.dtype(key) for key, _ in sources]
        pattern = sources[0][1]
        if pattern is None or (target in self._expert_targets and self._joined(sources)):
            return reduce(torch.promote_types, stored)
        kind = (pattern, *stored)
        if kind not in self._converted_dtypes:
            self._converted_dtypes[kind] = self._convert(target, sources).dtype
        return self._converted_dtypes[kind]

    def _convert(self, target: str, sources: list[Source]) -> torch.Tensor:
        key, pattern = sources[0]
        if pattern is None:
            return self._files.tensor(key)
        converter: Any = deepcopy(self._by_pattern[pattern])
        weights = {f"{pattern}{SCALE_SUFFIX}": key for key, pattern in sources}
        for key, pattern in sources:
            tensor = self._files.tensor(key)
            if pattern in weights:
                tensor = self._dequantiser.whole_blocks(tensor, self._files.shape(weights[pattern]))
            converter.add_tensor(target, key, pattern, tensor)
        try:
            converted = converter.convert(target, model=self._model, config=self._model.config)[target]
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(
                f"{self._directory}: {key} and its like give no {target} ({reason:.120}); is a tensor missing?"
            ) from error
        dtypes = [self._files.dtype(key) for key, _ in sources]
        return self._dequantiser.stored(converted[0] if isinstance(converted, list) else converted, dtypes)

    def _expert_pieces(self, target: str, expert: int) -> list[torch.Tensor]:
        sources = self._sources[target]
        if expert in sources and (keys := self._joined(sources[expert])):
            return [self._files.tensor(key) for key in keys]
        return [self._fitting(target, self._expert_tensor(target, expert), self._meta[target].shape[1:])]

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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
