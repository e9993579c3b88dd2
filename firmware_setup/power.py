"""Power modes out of the board's own nvpmodel.conf, the mode it is in, and whether its clocks are locked.

Modes are known by name: number 0 is the fastest on some boards and the slowest on others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from firmware_setup.machine import Answer, Machine

CONF = "/etc/nvpmodel.conf"  # a link that is made again at boot
MOST_MODES = 64
INT = "-?[0-9]{1,18}"
MODE_TAG = re.compile(r"<\s*POWER_MODEL\s+ID\s*=\s*([0-9]{1,4})\s+NAME\s*=\s*([^\s<>]{1,64})\s*>")
DEFAULT_TAG = re.compile(r"<\s*PM_CONFIG\s+DEFAULT\s*=\s*([0-9]{1,4})\s*>")
SETTING = re.compile(rf"([A-Z][A-Z0-9_]{{0,63}})\s+([A-Z][A-Z0-9_]{{0,63}})\s+({INT})")
MODE_LINE = re.compile(r"^(?:NVPM VERB: Current mode: )?NV Power Mode:[ \t]*([^\s]{1,64})[ \t\r]*$", re.MULTILINE)
NUMBER_LINE = re.compile(r"^([0-9]{1,4})[ \t\r]*$", re.MULTILINE)
CLOCK_LINE = re.compile(
    r"^(?P<name>cpu[0-9]{1,3}|GPU|EMC|gpu-[a-z0-9-]{1,16}):?[ \t](?P<before>[^\n]*?)"
    r"MinFreq=(?P<least>[0-9]{1,15})[ \t]+MaxFreq=(?P<most>[0-9]{1,15})[ \t]+CurrentFreq=(?P<now>[0-9]{1,15})",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Mode:
    number: int
    name: str
    limits: dict[str, int]  # "GPU MAX_FREQ" -> 918000000, as the file has them; -1 there means no limit


@dataclass(frozen=True)
class Power:
    mode: str | None  # None: nvpmodel does not tell
    mode_number: int | None
    default_number: int | None
    modes: list[Mode]

    @property
    def limits(self) -> dict[str, int]:
        """Of the mode it is in; empty where that is not known."""
        return next((mode.limits for mode in self.modes if mode.name == self.mode), {})


@dataclass(frozen=True)
class Clock:
    name: str  # cpu0, GPU, EMC, gpu-gpc-0
    least_hz: int
    most_hz: int
    now_hz: int


@dataclass(frozen=True)
class Clocks:
    locked: bool | None  # lowest = highest on every online core and the GPU; None: not known
    clocks: list[Clock]
    why_unknown: str | None


def read_power(machine: Machine) -> Power:
    modes, default_number = parse_conf(machine.text(CONF))
    mode, number = parse_mode(machine.run("nvpmodel", "-q").text)
    return Power(mode, number, default_number, modes)


def read_clocks(machine: Machine) -> Clocks:
    answer = machine.run("jetson_clocks", "--show")
    clocks = parse_clocks(answer.text) if answer.code is not None else []
    locked = are_locked(clocks)
    return Clocks(locked, clocks, None if locked is not None else _why(answer))


def parse_conf(text: str) -> tuple[list[Mode], int | None]:
    """Modes in the file's order, and the number of the default. What follows no mode's tag is no setting of one."""
    modes: list[Mode] = []
    default_number: int | None = None
    limits: dict[str, int] | None = None
    for whole_line in text.splitlines():
        line = whole_line.split("#", maxsplit=1)[0].strip()
        if line.startswith("<"):
            limits = None
            if (tag := MODE_TAG.match(line)) and len(modes) < MOST_MODES:
                limits = {}
                modes.append(Mode(int(tag[1]), tag[2], limits))
            elif tag := DEFAULT_TAG.match(line):
                default_number = int(tag[1])
        elif limits is not None and (setting := SETTING.fullmatch(line)):
            limits[f"{setting[1]} {setting[2]}"] = int(setting[3])
    return modes, default_number


def parse_mode(text: str) -> tuple[str | None, int | None]:
    """Name and number of `nvpmodel -q`'s two lines, whatever warnings and fan modes stand around them."""
    mode = MODE_LINE.search(text)
    if mode is None:
        return None, None
    number = NUMBER_LINE.search(text, mode.end())
    return mode[1], None if number is None else int(number[1])


def parse_clocks(text: str) -> list[Clock]:
    """Cores that are online, GPU and memory (EMC) of `jetson_clocks --show`, in Hz; the cores' are printed in kHz."""
    found = []
    for match in CLOCK_LINE.finditer(text):
        if "Online=0" in match["before"]:
            continue
        hz = 1000 if match["name"].startswith("cpu") else 1
        found.append(Clock(match["name"], *(int(match[field]) * hz for field in ("least", "most", "now"))))
    return found


def are_locked(clocks: list[Clock]) -> bool | None:
    """EMC is not asked: a locked Thor shows a range there."""
    cpus = [clock for clock in clocks if clock.name.startswith("cpu")]
    gpus = [clock for clock in clocks if clock.name.lower().startswith("gpu")]
    if not cpus or not gpus:
        return None
    return all(clock.least_hz == clock.most_hz for clock in cpus + gpus)


def _why(answer: Answer) -> str:
    return "jetson_clocks --show needs root" if "as a root user" in answer.text else answer.first_line
