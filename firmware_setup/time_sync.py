"""How far this board's clock is from its time server, as chrony knows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from firmware_setup.machine import Machine

FIELDS = 14  # of `chronyc -c tracking`; the order is that of its report, from reference ID to leap status
LOCAL_REFERENCE = "7F7F0101"  # the clock is its own reference


@dataclass(frozen=True)
class TimeSync:
    synchronised: bool | None  # None: chrony does not tell
    server: str | None
    abs_offset_s: float | None  # system clock against server, without sign
    bound_s: float | None  # root dispersion + half the root delay: how far the server itself may be off
    why_unknown: str | None


def read_time_sync(machine: Machine) -> TimeSync:
    answer = machine.run("chronyc", "-c", "tracking")
    known = parse_tracking(answer.text) if answer.good else None
    return TimeSync(None, None, None, None, answer.first_line) if known is None else known


def parse_tracking(text: str) -> TimeSync | None:
    """One line of comma-separated values; None where it is none."""
    fields = text.strip().split("\n")[0].split(",")
    if len(fields) != FIELDS:
        return None
    offset_s, delay_s, dispersion_s = (_number(fields[place]) for place in (4, 10, 11))
    if offset_s is None or delay_s is None or dispersion_s is None:
        return None
    if fields[13] == "Not synchronised" or fields[0] in ("00000000", LOCAL_REFERENCE):
        return TimeSync(False, None, None, None, None)
    return TimeSync(True, fields[1][:64] or None, abs(offset_s), abs(dispersion_s) + abs(delay_s) / 2, None)


def _number(text: str) -> float | None:
    try:
        value = float(text) if len(text) < 40 else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
