"""Memory and temperatures, as the kernel tells them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from firmware_setup.machine import Machine

THERMAL = "/sys/class/thermal"
COLDEST_C, HOTTEST_C = -100.0, 250.0  # beyond these a zone has no power: -256, or what 0x7fffffff says
SLOWS_DOWN = re.compile("cpu|gpu|processor|throttle|devfreq")  # types of cooling devices; the others are fans
MEMORY_LINE = re.compile(r"^([A-Za-z]{1,32}):\s{1,32}([0-9]{1,15}) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """CPU and GPU share it. In a container it is the host's."""

    total_bytes: int | None
    available_bytes: int | None
    swap_total_bytes: int | None


@dataclass(frozen=True)
class Thermal:
    zones_c: dict[str, float]
    hottest_c: float | None
    throttled: bool | None  # a cooling device that slows CPU or GPU is at work; None: none is there


def read_memory(machine: Machine) -> Memory:
    return parse_memory(machine.text("/proc/meminfo"))


def parse_memory(meminfo: str) -> Memory:
    found = {match[1]: int(match[2]) * 1024 for match in MEMORY_LINE.finditer(meminfo)}
    return Memory(found.get("MemTotal"), found.get("MemAvailable"), found.get("SwapTotal"))


def read_thermal(machine: Machine) -> Thermal:
    """The hottest zone of a name counts; a zone without power is left out."""
    zones_c: dict[str, float] = {}
    slowing = []
    for name in machine.names(THERMAL):
        folder = f"{THERMAL}/{name}"
        kind = machine.text(f"{folder}/type", 64).strip()
        if name.startswith("thermal_zone") and kind:
            milli_c = machine.number(f"{folder}/temp")
            if milli_c is not None and COLDEST_C < milli_c / 1000 < HOTTEST_C:
                zone = re.sub("[-_]therm(al)?$", "", kind.lower())
                zones_c[zone] = max(zones_c.get(zone, COLDEST_C), milli_c / 1000)
        elif name.startswith("cooling_device") and SLOWS_DOWN.search(kind.lower()):
            slowing.append(machine.number(f"{folder}/cur_state"))
    states = [state for state in slowing if state is not None]
    return Thermal(zones_c, max(zones_c.values(), default=None), any(state > 0 for state in states) if states else None)
