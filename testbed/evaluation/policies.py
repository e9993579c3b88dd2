"""Policies named on the command line, as the run file would have them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from testbed.config.loading import asked_policy
from testbed.errors import ConfigError


def policies_override(policies: Sequence[str]) -> list[str]:
    """`wlr:theta=0.2` and the like as one KEY=VALUE for the run file; topk, the reference, comes first if not named.

    Returns nothing for nothing. Raises ConfigError where one is not NAME:KEY=VALUE,KEY=VALUE.
    """
    if not policies:
        return []
    tables = [_table(policy) for policy in policies]
    if not tables[0].startswith('{name = "topk"}'):
        tables.insert(0, '{name = "topk"}')
    return [f"policy=[{', '.join(tables)}]"]


def _table(policy: str) -> str:
    name, settings = asked_policy(policy)
    pairs = [setting.partition("=") for setting in settings]
    if not name or "=" in name or any(not (key.isidentifier() and value) for key, _, value in pairs):
        raise ConfigError(f"--policy {policy}: write NAME:KEY=VALUE,KEY=VALUE, such as wlr:theta=0.2")
    return (
        "{" + ", ".join([f"name = {json.dumps(name)}", *(f"{key} = {_value(value)}" for key, _, value in pairs)]) + "}"
    )


def _value(text: str) -> str:
    """As TOML writes it: a number or a boolean as it is, all else as text."""
    try:
        known = json.loads(text)
    except ValueError:
        known = text
    return text if isinstance(known, (bool, int, float)) else json.dumps(text)
