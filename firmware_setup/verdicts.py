"""What is wrong with a board, and what to do about it, from what was read of it."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from firmware_setup.facts import Facts
from firmware_setup.known_bad import known_faults
from firmware_setup.l4t import UNKNOWN, major_of

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST_L4T = 36  # JetPack 6
OLDEST_PYTHON = (3, 10)
PYTHON_OF_L4T = {32: "3.6", 35: "3.8"}  # where no node runs
CUDA_OF_L4T = {36: "12", 38: "13", 39: "13"}
LEAST_MEMORY_BYTES = 2**30  # torch with CUDA takes about as much before any expert is loaded
WEAK_DBM, HOT_C, FAR_S = -70, 85.0, 0.05
SLOW_GPU = 0.9  # of what the power mode allows
USB_AND_DOCKER = ("l4tbr", "usb", "docker")


class Finding(NamedTuple):
    level: str  # warning: a node runs, but see to it; problem: no node runs, or it would compute wrong
    check: str
    text: str


def judge(facts: Facts) -> list[Finding]:
    rules = (_board, _software, _power, _clocks, _memory, _thermal, _cuda, _wifi, _time, _route)
    return list(chain.from_iterable(rule(facts) for rule in rules))


def _warning(check: str, text: str) -> Finding:
    return Finding("warning", check, text)


def _problem(check: str, text: str) -> Finding:
    return Finding("problem", check, text)


def _board(facts: Facts) -> Iterator[Finding]:
    board = facts.board
    if board is None:
        return
    if not facts.is_jetson:
        yield _warning("board", "no Jetson, by its device tree; what only a Jetson has was not judged")
    elif board.module == UNKNOWN:
        yield _warning("board", f"module {board.part} on {board.soc} is not known here; figures of it are not checked")
    if board.super_mode is False:
        yield _warning("board", "flashed without super mode: MAXN_SUPER is missing until it is flashed as -super")


def _software(facts: Facts) -> Iterator[Finding]:
    software = facts.software
    if software is None:
        return
    major = major_of(software.l4t)
    version = _version(software.python)
    if major is not None and major < OLDEST_L4T:
        python = PYTHON_OF_L4T.get(major, "older than 3.10")
        what = f"JetPack {software.jetpack}" if software.jetpack != UNKNOWN else f"L4T {software.l4t}"
        yield _problem("software", f"not supported: Python {python} ({what}); flash JetPack 6 or newer, if it has one")
    elif version and version < OLDEST_PYTHON:
        yield _problem("software", f"not supported: Python {software.python}; nodes need 3.10 or newer")
    if not facts.is_jetson:
        return
    if major is None:
        yield _warning("software", "L4T is unknown: neither nvidia-l4t-core nor /etc/nv_tegra_release tells it")
    elif software.jetpack == UNKNOWN:
        yield _warning("software", f"the JetPack of L4T {software.l4t} is not known here")
    if facts.board is not None:
        for fault in known_faults(facts.board, software):
            yield _warning("software", fault)


def _power(facts: Facts) -> Iterator[Finding]:
    power = facts.power
    if power is None or not facts.is_jetson:
        return
    if power.mode is None:
        yield _warning("power", "nvpmodel -q does not tell the power mode; it is not recorded with the run")
    elif power.mode not in [mode.name for mode in power.modes]:
        yield _warning("power", f"power mode {power.mode} is not in /etc/nvpmodel.conf")
    allowed_hz = power.limits.get("GPU MAX_FREQ", -1)
    gpu_hz = max(
        (clock.most_hz for clock in (facts.clocks.clocks if facts.clocks else []) if clock.name == "GPU"), default=0
    )
    if gpu_hz and gpu_hz < SLOW_GPU * allowed_hz:
        yield _warning(
            "power",
            f"the GPU may reach {gpu_hz / 1e6:g} MHz only, {power.mode} allows {allowed_hz / 1e6:g}; "
            "seen after upgrades to 7.2 (stuck at 624.75): flash again if a reboot does not help",
        )


def _clocks(facts: Facts) -> Iterator[Finding]:
    clocks = facts.clocks
    if clocks is None or not facts.is_jetson:
        return
    if clocks.locked is None:
        yield _warning("clocks", f"not known whether clocks are locked: {clocks.why_unknown}")
    elif not clocks.locked:
        yield _warning("clocks", "not locked, so compute times vary with load: sudo jetson_clocks")


def _memory(facts: Facts) -> Iterator[Finding]:
    available_bytes = facts.memory.available_bytes if facts.memory else None
    if available_bytes is not None and available_bytes < LEAST_MEMORY_BYTES:
        yield _warning(
            "memory", f"{available_bytes / 2**20:.0f} MiB are available; stop the desktop and other programs"
        )


def _thermal(facts: Facts) -> Iterator[Finding]:
    thermal = facts.thermal
    if thermal is None:
        return
    if thermal.throttled:
        yield _warning("thermal", "CPU or GPU are being slowed down; let it cool, and see to its fan")
    elif thermal.hottest_c is not None and thermal.hottest_c >= HOT_C:
        yield _warning("thermal", f"{thermal.hottest_c:.0f} C: it will be slowed down under load; see to its fan")


def _cuda(facts: Facts) -> Iterator[Finding]:
    cuda, software = facts.cuda, facts.software
    if cuda is None or not cuda.asked:
        return
    remedy = "" if software is None or software.jetpack_package else "; nvidia-jetpack is not installed"
    if cuda.error is not None:
        yield _problem("cuda", f"the test product failed: {cuda.error}{remedy if facts.is_jetson else ''}")
    elif cuda.torch is None:
        yield _warning("cuda", "torch is not installed: a node computes with numpy on the CPU")
    elif cuda.products_right is False:
        yield _problem("cuda", f"torch {cuda.torch} computes wrong products on {cuda.device}; install another build")
    elif not cuda.available and facts.is_jetson:
        build = f"built for CUDA {cuda.built_for_cuda}" if cuda.built_for_cuda else "built without CUDA"
        yield _warning(
            "cuda",
            f"torch {cuda.torch}, {build}, finds no GPU: a node computes on the CPU; "
            f"whoever runs it must be in the groups video and render{remedy}",
        )
    if cuda.torch is not None and cuda.numpy_bridge is False:
        yield _problem(
            "cuda", f"torch {cuda.torch} and the numpy beside it do not work together; install matching builds"
        )
    wanted = CUDA_OF_L4T.get(major_of(software.l4t) or 0) if software else None
    if wanted and cuda.built_for_cuda and cuda.built_for_cuda.split(".")[0] != wanted and software:
        yield _warning("cuda", f"torch is built for CUDA {cuda.built_for_cuda}, L4T {software.l4t} has CUDA {wanted}.x")


def _wifi(facts: Facts) -> Iterator[Finding]:
    if facts.wifi is None:
        return
    if not facts.wifi and facts.is_jetson:
        yield _warning("wifi", "no Wi-Fi interface: rounds will not be over the air")
    for wifi in facts.wifi:
        if not wifi.connected:
            state = "not connected" if wifi.connected is False else "not known whether it is connected (iw)"
            yield _warning("wifi", f"{wifi.interface}: {state}")
            continue
        if wifi.power_save:
            remedy = f"sudo iw dev {wifi.interface} set power_save off"
            yield _warning("wifi", f"{wifi.interface}: power save is on, which delays small messages: {remedy}")
        elif wifi.power_save is None:
            yield _warning("wifi", f"{wifi.interface}: not known whether power save is on")
        if wifi.signal_dbm is not None and wifi.signal_dbm < WEAK_DBM:
            yield _warning("wifi", f"{wifi.interface}: weak signal, {wifi.signal_dbm} dBm")


def _time(facts: Facts) -> Iterator[Finding]:
    time = facts.time
    if time is None:
        return
    if time.synchronised is None:
        yield _warning("time", f"the clock's offset is not known: {time.why_unknown}")
    elif not time.synchronised:
        yield _warning("time", "chrony is not synchronised; its server may be out of reach")
    elif time.abs_offset_s is not None and time.abs_offset_s > FAR_S:
        yield _warning("time", f"the clock is {time.abs_offset_s * 1000:.0f} ms off; wait, or sudo chronyc makestep")


def _route(facts: Facts) -> Iterator[Finding]:
    route = facts.route
    if route is None:
        return
    on_air = [wifi.interface for wifi in facts.wifi or [] if wifi.connected]
    if route.error is not None:
        yield _problem("route", f"no way to the base station {route.bs}: {route.error}")
    elif route.interface is not None and route.interface.startswith(USB_AND_DOCKER):
        yield _warning("route", f"the base station is reached by {route.interface}, which is USB or Docker")
    elif route.medium != "wifi" and on_air:
        instead = f"{route.interface} ({route.medium}), not by {on_air[0]}"
        yield _warning("route", f"the base station is reached by {instead}: rounds will not be over the air")


def _version(python: str | None) -> tuple[int, int] | None:
    match = re.match("([0-9]{1,3})[.]([0-9]{1,3})", python or "")
    return (int(match[1]), int(match[2])) if match else None
