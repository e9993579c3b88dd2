"""Temperatures, CPU clock and throttling of this machine out of /sys; laptops and Jetsons alike.

Not psutil's, which fails on a Jetson's unpowered zones (they answer EAGAIN) and reads three files per core. Not yet run
on hardware.
"""

from __future__ import annotations

import re
from pathlib import Path

SYS = Path("/sys")
COLDEST_C, HOTTEST_C = -100.0, 250.0  # beyond these a zone is off: -256, or what 0x7fffffff says
SLOWS_DOWN = re.compile(r"cpu|gpu|processor|throttle|devfreq")  # types of cooling devices; the others are fans
MOST_ZONES = 24
LONGEST_NAME = 32  # characters


class HostSensors:
    """Which files there are is looked up once; `read` opens each of them, some ten microseconds a file."""

    def __init__(self, root: Path = SYS) -> None:
        zones = sorted((root / "class/thermal").glob("thermal_zone*"))
        self._zones = [(f"{zone_name(kind)}_c", zone / "temp") for zone in zones if (kind := _text(zone / "type"))]
        cooling = sorted((root / "class/thermal").glob("cooling_device*"))
        self._cooling = [d / "cur_state" for d in cooling if SLOWS_DOWN.search(_text(d / "type").lower())]
        self._clocks = sorted((root / "devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq"))

    def read(self) -> dict[str, float | None]:
        """`cpu_mhz`, the mean over clusters; `throttled`, 1 or 0; a temperature in °C per zone, the hottest of a name.

        What this machine has no sensor for is left out; a sensor that does not answer is None.
        """
        figures: dict[str, float | None] = {}
        if self._clocks:
            khz = [value for path in self._clocks if (value := _number(path)) is not None]
            figures["cpu_mhz"] = sum(khz) / len(khz) / 1000 if khz else None
        if self._cooling:
            states = [state for path in self._cooling if (state := _number(path)) is not None]
            figures["throttled"] = float(any(state > 0 for state in states)) if states else None
        for name, path in self._zones[:MOST_ZONES]:
            figures[name] = _hotter(figures.get(name), _celsius(path))
        return figures


def zone_name(kind: str) -> str:
    """`cpu` of cpu-thermal (JetPack 6), CPU-therm (JetPack 5) or cpu_thermal."""
    return plain_name(re.sub(r"[-_]therm(al)?$", "", kind, flags=re.IGNORECASE))


def plain_name(sensor: str) -> str:
    """A sensor's name as figures have it: lower case, words joined by an underscore, of bounded length."""
    return re.sub(r"[^a-z0-9]+", "_", sensor.lower())[:LONGEST_NAME].strip("_")


def _celsius(path: Path) -> float | None:
    milli = _number(path)
    return milli / 1000 if milli is not None and COLDEST_C < milli / 1000 < HOTTEST_C else None


def _hotter(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else max(one, other)


def _number(path: Path) -> float | None:
    try:
        return float(int(_text(path)))
    except ValueError:
        return None


def _text(path: Path) -> str:
    """Empty where it cannot be read; a zone without power makes a buffered read raise TypeError."""
    try:
        return path.read_bytes()[:64].decode("ascii").strip()
    except (OSError, TypeError, ValueError):
        return ""
