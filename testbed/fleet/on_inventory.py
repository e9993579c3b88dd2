"""A run file, run on the boards of an inventory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.config import RunConfig
from testbed.config.loading import apply_override, first_mistake, read_toml
from testbed.errors import ConfigError
from testbed.fleet.inventory import Inventory

EMULATED = ("radio", "throttle", "emulation")  # tables that have no meaning where links and devices are real
OF_A_BOARD = ("joule_per_flop",)  # what a [[device]] may say of a board that it cannot say itself


def left_out(path: Path) -> list[str]:
    """What of a run file does not hold on boards."""
    content = read_toml(path)
    return [f"[{key}]" for key in EMULATED if content.get(key)]


def load_on_inventory(path: Path, overrides: Sequence[str], inventory: Inventory) -> RunConfig:
    """The run file with the inventory's devices in place of its own.

    The base station listens where the boards expect it and starts no nodes. What is emulated is left out. The model
    is the split that the inventory names, where it names one; else it is split as [placement] says. Raises ConfigError.
    """
    content = read_toml(path)
    for key in EMULATED:
        content.pop(key, None)
    devices = content.get("device")
    own = {d.get("name"): d for d in devices if isinstance(d, dict)} if isinstance(devices, list) else {}
    content["device"] = [
        {"name": board.name, "address": board.address, **_kept(own.get(board.name, {}))} for board in inventory.boards
    ]
    listen, fleet = _table(content, "listen", path), _table(content, "fleet", path)
    listen |= {"host": inventory.bs_address, "port": inventory.bs_port}
    fleet |= {"start": "none"}
    if inventory.keys is not None:
        fleet |= {"keys": str(inventory.keys)}
    if inventory.split is not None:
        model = _table(content, "model", path)
        model |= {"path": str(inventory.split)}
        content.pop("placement", None)  # the split says it
    for override in overrides:
        apply_override(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path} on {inventory.file}: {first_mistake(error)}") from error


def _kept(device: dict[str, Any]) -> dict[str, Any]:
    return {key: device[key] for key in OF_A_BOARD if key in device}


def _table(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = content.setdefault(key, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {key}: must be a table of keys")
    return table
