"""Which device holds which experts.

A placement says for every MoE layer and expert on which devices it lives: `placement[layer][expert]` is a tuple of
device names, more than one where the expert is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from testbed.errors import ConfigError

Placement = tuple[tuple[tuple[str, ...], ...], ...]
Held = Sequence[int] | Sequence[Sequence[int]]  # a device's experts: the same in every layer, or a list per layer


def place(
    experts_per_layer: Sequence[int],
    devices: Sequence[str],
    mapping: Mapping[str, Held] | None = None,
) -> Placement:
    """The given mapping (device -> the experts that it holds, in every layer or layer by layer), or the default one.

    Default: expert q on device q; where there are more experts than devices, expert q on device q mod N.
    Raises ConfigError, naming device or expert, for a placement that cannot work.
    """
    _check_devices(devices)
    if mapping is None:
        mapping = round_robin(max(experts_per_layer), devices)
    if unknown := sorted(set(mapping) - set(devices)):
        raise ConfigError(f"placement: device {unknown[0]!r} is not one of {', '.join(devices)}")
    held = {device: _by_layer(device, mapping.get(device, ()), experts_per_layer) for device in devices}
    for layer, experts in enumerate(experts_per_layer):
        placed = {expert for rows in held.values() for expert in rows[layer]}
        if nowhere := sorted(set(range(experts)) - placed):
            raise ConfigError(f"placement: expert {nowhere[0]} is on no device; give it to one")
    return tuple(
        tuple(tuple(d for d in devices if expert in held[d][layer]) for expert in range(experts))
        for layer, experts in enumerate(experts_per_layer)
    )


def round_robin(experts: int, devices: Sequence[str]) -> dict[str, list[int]]:
    return {device: list(range(n, experts, len(devices))) for n, device in enumerate(devices)}


def as_mapping(placement: Placement, devices: Sequence[str]) -> dict[str, list[int] | list[list[int]]]:
    """What `place` makes the placement of: one list of a device where every layer is the same, else one per layer."""
    mapping: dict[str, list[int] | list[list[int]]] = {}
    is_same = all(row == placement[0] for row in placement)
    for device in devices:
        layers = [[expert for expert, holders in enumerate(row) if device in holders] for row in placement]
        mapping[device] = layers[0] if is_same else layers
    return mapping


def _check_devices(devices: Sequence[str]) -> None:
    if not devices:
        raise ConfigError("placement: no device is named; name at least one")
    twice = sorted({d for d in devices if list(devices).count(d) > 1})
    if twice:
        raise ConfigError(f"placement: device {twice[0]!r} is named twice; give each device its own name")


def _by_layer(device: str, held: Held, experts_per_layer: Sequence[int]) -> list[frozenset[int]]:
    """A device's experts in each layer; where one list stands for all, layers with fewer experts hold fewer of them."""
    if not any(isinstance(row, int) or len(row) for row in held):
        raise ConfigError(f"placement: device {device!r} would hold no expert; give it one or leave it out")
    layers, most = len(experts_per_layer), max(experts_per_layer)
    if all(isinstance(expert, int) for expert in held):
        same = [cast("Sequence[int]", held)] * layers
        limits = [most] * layers
    else:
        same, limits = list(cast("Sequence[Sequence[int]]", held)), list(experts_per_layer)
    if len(same) != layers:
        raise ConfigError(f"placement: device {device!r} lists {len(same)} layers; the model has {layers} with experts")
    for experts, limit in zip(same, limits, strict=True):
        if wrong := [expert for expert in experts if not 0 <= expert < limit]:
            raise ConfigError(f"placement: device {device!r} is given expert {wrong[0]}; experts are 0 to {limit - 1}")
    return [frozenset(experts) for experts in same]
