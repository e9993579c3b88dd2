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
from typing import Any

import psutil

OFFLINE_C = -256  # what jtop reports for a sensor that is not there
Figures = dict[str, float | None]


class Telemetry:
    """Figures for a heartbeat; cheap enough for the loop that computes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only sets the reference
        self._board: Figures = {}
        self._sampler = _start_sampler() if importlib.util.find_spec("jtop") else None
        self._unread = b""

    def figures(self) -> Figures:
        """rss_bytes, cpu_percent (of this process), load_1m, memory_available_bytes and the board's own, if any."""
        self._read_sampler()
        return {
            "rss_bytes": self._process.memory_info().rss,
            "cpu_percent": self._process.cpu_percent(),
            "load_1m": os.getloadavg()[0],
            "memory_available_bytes": psutil.virtual_memory().available,
            **self._board,
        }

    def _read_sampler(self) -> None:
        if self._sampler is None or self._sampler.stdout is None:
            return
        self._unread += self._sampler.stdout.read() or b""
        *lines, self._unread = self._unread.split(b"\n")
        if lines:
            self._board = _figures_of_line(lines[-1])
        elif self._sampler.poll() is not None:  # it ended: what it said last is no longer true
            self._board = {}

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.kill()
            self._sampler.wait()


def _start_sampler() -> subprocess.Popen[bytes]:
    sampler = subprocess.Popen([sys.executable, "-m", "jetson_node.jtop_sampler"], stdout=subprocess.PIPE, bufsize=0)
    if sampler.stdout is not None:
        os.set_blocking(sampler.stdout.fileno(), False)
    return sampler


def _figures_of_line(line: bytes) -> Figures:
    try:
        stats = json.loads(line)
    except ValueError:
        return {}
    return board_figures(stats) if isinstance(stats, dict) else {}


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
