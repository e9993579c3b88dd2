"""Which device holds which experts.

A placement says for every MoE layer and expert on which devices it lives: `placement[layer][expert]` is a tuple of
device names, more than one where the expert is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from testbed.errors import ConfigError

Placement = tuple[tuple[tuple[str, ...], ...], ...]


def place(
    experts_per_layer: Sequence[int],
    devices: Sequence[str],
    mapping: Mapping[str, Sequence[int]] | None = None,
) -> Placement:
    """The run file's mapping (device -> the experts that it holds in every layer), or the default one.

    Default: expert q on device q; where there are more experts than devices, expert q on device q mod N.
    Raises ConfigError, naming device or expert, for a placement that cannot work.
    """
    _check_devices(devices)
    if mapping is None:
        mapping = _round_robin(max(experts_per_layer), devices)
    _check_mapping(experts_per_layer, devices, mapping)
    return tuple(
        tuple(tuple(d for d in devices if expert in mapping[d]) for expert in range(experts))
        for experts in experts_per_layer
    )


def _round_robin(experts: int, devices: Sequence[str]) -> dict[str, list[int]]:
    return {device: list(range(n, experts, len(devices))) for n, device in enumerate(devices)}


def _check_devices(devices: Sequence[str]) -> None:
    if not devices:
        raise ConfigError("placement: no device is named; name at least one")
    twice = sorted({d for d in devices if list(devices).count(d) > 1})
    if twice:
        raise ConfigError(f"placement: device {twice[0]!r} is named twice; give each device its own name")


def _check_mapping(
    experts_per_layer: Sequence[int], devices: Sequence[str], mapping: Mapping[str, Sequence[int]]
) -> None:
    if unknown := sorted(set(mapping) - set(devices)):
        raise ConfigError(f"placement: device {unknown[0]!r} is not one of {', '.join(devices)}")
    experts = max(experts_per_layer)
    for device in devices:
        held = mapping.get(device, ())
        if not held:
            raise ConfigError(f"placement: device {device!r} would hold no expert; give it one or leave it out")
        if wrong := [expert for expert in held if not 0 <= expert < experts]:
            raise ConfigError(
                f"placement: device {device!r} is given expert {wrong[0]}; experts are 0 to {experts - 1}"
            )
    placed = {expert for held in mapping.values() for expert in held}
    if nowhere := sorted(set(range(experts)) - placed):
        raise ConfigError(f"placement: expert {nowhere[0]} is on no device; give it to one")
