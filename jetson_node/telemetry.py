"""What a heartbeat reports: this process and machine by psutil and, on a Jetson, the board by jtop.

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

from testbed.wire.figures import BOARD_AGE_S, TOTAL_RAIL

OFFLINE_C = -256  # what jtop reports for a sensor that is not there
LONGEST_RAIL = 64  # characters
Figures = dict[str, float | None]


class BoardSample(NamedTuple):
    """A line of the sampler."""

    sampled_ns: int  # this machine's monotonic clock
    total_rail: str | None
    stats: dict[str, Any]

    def figures(self, now_ns: int) -> Figures:
        """The board's figures and how old they are: a sampler that is stuck must not look fresh."""
        rail: Figures = {} if self.total_rail is None else {TOTAL_RAIL + self.total_rail[:LONGEST_RAIL]: 1.0}
        return {**board_figures(self.stats), BOARD_AGE_S: (now_ns - self.sampled_ns) / 1e9, **rail}


class Telemetry:
    """Figures for a heartbeat; cheap enough for the loop that computes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only sets the reference
        self._board: BoardSample | None = None
        self._sampler = _start_sampler() if importlib.util.find_spec("jtop") else None
        self._unread = b""

    def figures(self) -> Figures:
        """rss_bytes, cpu_percent (of this process), load_1m, memory_available_bytes and the board's own, if any."""
        self._read_sampler()
        board = {} if self._board is None else self._board.figures(time.monotonic_ns())
        return {
            "rss_bytes": self._process.memory_info().rss,
            "cpu_percent": self._process.cpu_percent(),
            "load_1m": os.getloadavg()[0],
            "memory_available_bytes": psutil.virtual_memory().available,
            **board,
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
        sampled_ns, rail, stats = sample["sampled_ns"], sample["total_rail"], sample["stats"]
    except (ValueError, TypeError, KeyError):
        return None
    if type(sampled_ns) is not int or not isinstance(rail, str | None) or not isinstance(stats, dict):
        return None
    return BoardSample(sampled_ns, rail, stats)


def board_figures(stats: dict[str, Any]) -> Figures:
    """jtop's `stats` (versions 4 to 7) as figures with units: GPU %, temperatures in C, power in W.

    A sensor that is offline is None, never -256 or 0.
    """
    figures: Figures = {}
    for key, value in stats.items():
        number = float(value) if type(value) in (int, float) and math.isfinite(value) else None
        if key == "GPU":
            figures["gpu_percent"] = number
        elif key.startswith("Temp "):
            figures[f"{_name(key[5:])}_c"] = None if number is None or number <= OFFLINE_C else number
        elif key.startswith("Power "):
            figures[f"{_name(key[6:])}_w"] = None if number is None else number / 1000
    return figures


def _name(sensor: str) -> str:
    return sensor.lower().replace(" ", "_")
