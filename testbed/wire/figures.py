"""What a node tells of itself in a heartbeat: figures by name, the unit at the name's end.

A name comes from the network and ends up in logs and labels: only names of a known form are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Figures = Mapping[str, float | None]  # None: a sensor that is off, or does not answer

UNITS = {"_c": "°C", "_w": "W", "_mhz": "MHz", "_percent": "%", "_bytes": "bytes", "_rpm": "rpm"}
LOAD, THROTTLED = "load_1m", "throttled"  # of no unit; throttled: 1 while the kernel's thermal governor slows a clock
NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}(_c|_w|_mhz|_percent|_bytes|_rpm)")

# Of the machine, also where no jtop is; cpu_percent is the node's process's, of one core. All else is the board's.
HOST = (
    "cpu_percent", "machine_cpu_percent", LOAD, "rss_bytes", "memory_available_bytes", "cpu_mhz", THROTTLED,
)  # fmt: skip

TOTAL_POWER_W = "tot_w"  # in events and tables it is power_w
HOST_AGE_S = "host_age_s"  # since the machine's figures were read, when the heartbeat was sent
BOARD_AGE_S = "board_age_s"  # ... since the board was sampled
TOTAL_RAIL = "tot_rail:"  # a figure is a number, so what follows in this one's name is the rail; its value is 1
SUM_OF_RAILS = "sum"  # in place of a rail's name, on boards where none carries the total (AGX Orin, AGX Xavier)
BOARD_INTERVAL_S = 1.0  # between two samples of a board


class Sample(NamedTuple):
    """Figures read at the same moment."""

    age_s: float
    figures: dict[str, float | None]


def total_rail(figures: Figures) -> str | None:
    """The rail that total power was measured on; None where the node does not say."""
    return next((name[len(TOTAL_RAIL) :] for name in figures if name.startswith(TOTAL_RAIL)), None)


def unit_of(name: str) -> str:
    """°C, W, MHz, %, bytes or rpm; empty for a plain number."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def is_figure(name: str) -> bool:
    """Whether the name has the form of a figure: lower case, of bounded length, with a unit that is known."""
    return name in HOST or NAME.fullmatch(name) is not None


def samples(figures: Figures) -> dict[str, Sample]:
    """The `host`'s figures and the `board`'s, each with its age; total power is left to whoever accounts for energy.

    Where no board was sampled all figures are the host's. A group without figures is left out.
    """
    named = {name: value for name, value in figures.items() if is_figure(name) and name != TOTAL_POWER_W}
    board_age_s = figures.get(BOARD_AGE_S)
    of_board = {} if board_age_s is None else {name: value for name, value in named.items() if name not in HOST}
    of_host = {name: value for name, value in named.items() if name not in of_board}
    groups = {"host": Sample(figures.get(HOST_AGE_S) or 0.0, of_host), "board": Sample(board_age_s or 0.0, of_board)}
    return {group: sample for group, sample in groups.items() if sample.figures}
