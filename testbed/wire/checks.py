"""What a field of a message may hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

MAX_TEXT = 512
MAX_SEGMENTS = 512
MAX_FIGURES = 48

Check = Callable[[Any], bool]


def whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def is_figure(value: Any) -> bool:
    """A finite number, or None where nothing was measured."""
    return value is None or (type(value) is float and math.isfinite(value)) or is_i64(value)


def is_segments(value: Any) -> bool:
    """[[expert, rows], ...]: whose rows follow one another in the block."""
    return (
        type(value) is list
        and 0 < len(value) <= MAX_SEGMENTS
        and all(type(s) is list and len(s) == 2 and is_expert(s[0]) and is_row_count(s[1]) for s in value)
    )


def is_held(value: Any) -> bool:
    """[experts held, per MoE layer]."""
    return type(value) is list and len(value) <= MAX_SEGMENTS and all(is_u16(v) for v in value)


def is_figures(value: Any) -> bool:
    return type(value) is dict and len(value) <= MAX_FIGURES and all(is_text(k) and is_figure(value[k]) for k in value)


is_u16 = whole(0, 2**16 - 1)
is_u64 = whole(0, 2**63 - 1)
is_i64 = whole(-(2**63), 2**63 - 1)
is_expert = whole(0, 2**15 - 1)
is_row_count = whole(1, 2**22)
is_width = whole(1, 2**20)
is_duration = whole(0, 2**62)


def one_of(*names: str) -> Check:
    return lambda value: type(value) is str and value in names
