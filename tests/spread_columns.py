"""Columns that travel side by side, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np

from testbed.runlog.columns import ROUND_COLUMNS, SPAN, span

NAMES = [column.name for column in ROUND_COLUMNS]


def spread(rounds: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of each column under its own name."""
    columns: dict[str, Any] = {}
    for name, value in rounds.items():
        if SPAN in name:
            names = span(name, NAMES)
            assert value.shape[1] == len(names)
            columns |= zip(names, np.copy(value).T, strict=True)
        else:
            columns[name] = deepcopy(value)
    return columns
