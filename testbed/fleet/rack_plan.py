"""What a virtual rack is asked to be, and what is known of one that is up, or was killed while it came up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import ConfigError
from testbed.fleet.rack_inventory import OWN_MARK
from testbed.fleet.rack_root import BASES

MOST_DEVICES = 64
LOWEST_MBIT_PER_S, HIGHEST_MBIT_PER_S = 0.01, 10_000.0


@dataclass(frozen=True)
class RackPlan:
    """What `testbed rack up` was asked for, and what it chose."""

    devices: tuple[str, ...]
    subnet: str
    base: str
    bare: bool  # no environment for a node: it is to be provisioned
    rate_mbit_per_s: float | None
    internet: bool
    inventory: str
    forwarding_before: str | None = None
    up: bool = False

    @classmethod
    def read(cls, file: Path) -> RackPlan | None:
        """What a rack's folder says; None where it says nothing, as after a power cut."""
        try:
            found = json.loads(file.read_text())
            return cls(**{**found, "devices": tuple(found["devices"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def require_sense(nodes: int, rate_mbit_per_s: float | None, base: str) -> None:
    """Raises ConfigError for what no rack can be."""
    if base not in BASES:
        raise ConfigError(f"--base {base}: there are {', '.join(BASES)}")
    if not 1 <= nodes <= MOST_DEVICES:
        raise ConfigError(f"--nodes {nodes}: from 1 to {MOST_DEVICES}")
    if rate_mbit_per_s is not None and not LOWEST_MBIT_PER_S <= rate_mbit_per_s <= HIGHEST_MBIT_PER_S:
        raise ConfigError(f"--rate-mbit {rate_mbit_per_s:g}: from {LOWEST_MBIT_PER_S:g} to {HIGHEST_MBIT_PER_S:g}")


def refuse_foreign(inventory: Path) -> None:
    """Raises ConfigError for a file that no rack has written, or that cannot be."""
    if inventory.exists() and not inventory.read_text(errors="replace").startswith(OWN_MARK):
        raise ConfigError(f"--inventory {inventory}: is there already and not a rack's: name another file")
    if not inventory.parent.is_dir():
        raise ConfigError(f"--inventory {inventory}: no such folder: make it, or name another file")
