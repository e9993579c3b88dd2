"""What makes a policy steerable: one number that trades quality for latency, under a name that all controllers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from testbed.errors import ConfigError

Steered = TypeVar("Steered", bound="Steerable")


class Steerable:
    """A policy with a strength: 0 is the unmodified model, `strongest` the most that a controller may ask for."""

    name: str
    params: Mapping[str, Any]
    strength_name: str
    strongest: float = 0.5

    def with_strength(self: Steered, value: float) -> Steered:
        """A new policy of the same kind and the same other parameters. Raises ConfigError as its constructor does."""
        return type(self)(**{**self.params, self.strength_name: value})


def checked_share(policy: str, parameter: str, value: float) -> float:
    """`value` if it is a number from 0 to 1. Raises ConfigError, naming policy and parameter, if it is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"policy {policy}: {parameter} must be a number from 0 to 1, not {value!r}")
    return float(value)
