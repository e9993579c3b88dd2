"""What a heartbeat reports: this process and machine by psutil and /sys and, on a Jetson, the board by jtop.

jtop runs in a process of its own (`jtop_sampler.py`): importing it changes multiprocessing's start method, and a
board service that hangs must not hang the experts. Not yet run on hardware; tested on captured output.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import psutil

from jetson_node.host_sensors import HostSensors, plain_name
from testbed.wire.figures import BOARD_AGE_S, HOST, HOST_AGE_S, LOAD, TOTAL_POWER_W, TOTAL_RAIL
from testbed.wire.messages import MAX_FIGURES

OFFLINE_C = -256  # what jtop reports for a sensor that is not there
LONGEST_RAIL = 64  # characters
HOST_EVERY_NS = 950_000_000  # reading /sys and /proc takes a fraction of a millisecond of the loop that computes
FIRST = (*HOST, HOST_AGE_S, BOARD_AGE_S, TOTAL_POWER_W)
Figures = dict[str, float | None]


class BoardSample(NamedTuple):
    """A line of the sampler."""

    sampled_ns: int  # this machine's monotonic clock
    total_rail: str | None
    stats: dict[str, Any]
    clocks: dict[str, Any]

    def figures(self, now_ns: int) -> Figures:
        """The board's figures and how old they are: a sampler that is stuck must not look fresh."""
        rail: Figures = {} if self.total_rail is None else {TOTAL_RAIL + self.total_rail[:LONGEST_RAIL]: 1.0}
        return {**board_figures(self.stats | self.clocks), BOARD_AGE_S: (now_ns - self.sampled_ns) / 1e9, **rail}


class Telemetry:
    """Figures for a heartbeat; cheap enough for the loop that computes."""

    def __init__(self, sensors: HostSensors | None = None) -> None:
        self._process, self._sensors = psutil.Process(), sensors or HostSensors()
        self._process.cpu_percent()  # the first call only sets the reference
        psutil.cpu_percent()
        self._host: Figures = {}
        self._host_ns: int | None = None
        self._board: BoardSample | None = None
        self._sampler = _start_sampler() if importlib.util.find_spec("jtop") else None
        self._unread = b""

    def figures(self) -> Figures:
        """The host's figures, read once a second, and the board's, if any; each group with its age.

        `testbed.wire.figures` says what of the host there is. Where a board tells temperatures, /sys need not.
        """
        self._read_sampler()
        now_ns = time.monotonic_ns()
        if self._host_ns is None or now_ns - self._host_ns >= HOST_EVERY_NS:
            self._host, self._host_ns = self._read_host(), now_ns
        host = {**self._host, HOST_AGE_S: (now_ns - self._host_ns) / 1e9}
        if self._board is None:
            return host
        known = {name: value for name, value in host.items() if not name.endswith("_c")}
        together = known | self._board.figures(now_ns)
        return dict(sorted(together.items(), key=_place)[:MAX_FIGURES])

    def _read_host(self) -> Figures:
        return {
            "rss_bytes": self._process.memory_info().rss,
            "cpu_percent": self._process.cpu_percent(),
            "machine_cpu_percent": psutil.cpu_percent(),
            LOAD: os.getloadavg()[0],
            "memory_available_bytes": psutil.virtual_memory().available,
            **self._sensors.read(),
        }

    def _read_sampler(self) -> None:
        if self._sampler is None or self._sampler.stdout is None:
            return
        self._unread += self._sampler.stdout.read() or b""
        *lines, self._unread = self._unread.split(b"\n")
        if lines:
            self._board = sample_of_line(lines[-1])
        elif self._sampler.poll() is not None:  # it ended: what it said last is no longer true
            self._board = None

    def close(self) -> None:
        if self._sampler is not None:
            with self._sampler:  # closes the pipe and waits for its end
                self._sampler.kill()


def _start_sampler() -> subprocess.Popen[bytes]:
    sampler = subprocess.Popen([sys.executable, "-m", "jetson_node.jtop_sampler"], stdout=subprocess.PIPE, bufsize=0)
    if sampler.stdout is not None:
        os.set_blocking(sampler.stdout.fileno(), False)
    return sampler


def sample_of_line(line: bytes) -> BoardSample | None:
    """What the sampler printed; None where that is no sample."""
    try:
        sample = json.loads(line)
        sampled_ns, rail, stats, clocks = (sample[name] for name in ("sampled_ns", "total_rail", "stats", "clocks"))
    except (ValueError, TypeError, KeyError):
        return None
    known = type(sampled_ns) is int and isinstance(rail, str | None)
    if not (known and isinstance(stats, dict) and isinstance(clocks, dict)):
        return None
    return BoardSample(sampled_ns, rail, stats, clocks)


def board_figures(stats: dict[str, Any]) -> Figures:
    """jtop's `stats` (versions 4 to 7) and the sampler's clocks as figures: %, temperatures in C, power in W, MHz, rpm.

    A sensor that is offline is None, never -256 or 0.
    """
    figures: Figures = {}
    for key, value in stats.items():
        number = float(value) if type(value) in (int, float) and math.isfinite(value) else None
        if key in ("GPU", "EMC"):
            figures[f"{key.lower()}_percent"] = number
        elif key.startswith("Temp "):
            figures[f"{plain_name(key[5:])}_c"] = None if number is None or number <= OFFLINE_C else number
        elif key.startswith("Power "):
            figures[f"{plain_name(key[6:])}_w"] = None if number is None else number / 1000
        elif key.startswith("Fan ") and key.endswith(" rpm"):
            figures[f"fan_{plain_name(key[4:-4])}_rpm"] = number
        elif key.startswith("Fan "):
            figures[f"fan_{plain_name(key[4:])}_percent"] = number
        elif key.startswith("Clock "):
            figures[f"{plain_name(key[6:])}_mhz"] = None if number is None else number / 1000
    return figures


def _place(figure: tuple[str, float | None]) -> tuple[bool, bool]:
    """What the base station needs first, should a board have more sensors than a heartbeat carries."""
    name, value = figure
    return name not in FIRST and not name.startswith(TOTAL_RAIL), value is None
