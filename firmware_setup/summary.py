"""A preflight for people: one line a part, then what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firmware_setup.facts import Facts

if TYPE_CHECKING:
    from firmware_setup.verdicts import Finding

NONE = "unknown"


def lines(facts: Facts, findings: list[Finding]) -> list[str]:
    parts = {
        "board": _board, "software": _software, "power": _power, "clocks": _clocks, "memory": _memory,
        "thermal": _thermal, "cuda": _cuda, "wifi": _wifi, "time": _time, "route": _route,
    }  # fmt: skip
    said = [f"{name:9} {part(facts)}" for name, part in parts.items()]
    said += [f"{finding.level:9} {finding.check}: {finding.text}" for finding in findings]
    problems = sum(finding.level == "problem" for finding in findings)
    return [*said, f"{problems} problem(s), {len(findings) - problems} warning(s)"]


def _board(facts: Facts) -> str:
    board = facts.board
    if board is None:
        return NONE
    return f"{board.model if board.module == NONE else board.module}, {board.part} on {board.carrier}, {board.soc}"


def _software(facts: Facts) -> str:
    software = facts.software
    if software is None:
        return NONE
    return (
        f"L4T {software.l4t}, JetPack {software.jetpack}, kernel {software.kernel}, "
        f"Python {software.python or 'not asked'}"
    )


def _power(facts: Facts) -> str:
    if facts.power is None:
        return NONE
    modes = ", ".join(mode.name for mode in facts.power.modes)
    return f"{facts.power.mode or NONE}, of {modes}" if modes else facts.power.mode or NONE


def _clocks(facts: Facts) -> str:
    locked = facts.clocks.locked if facts.clocks else None
    return NONE if locked is None else "locked" if locked else "not locked"


def _memory(facts: Facts) -> str:
    memory = facts.memory
    if memory is None or memory.total_bytes is None or memory.available_bytes is None:
        return NONE
    return f"{memory.available_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB available"


def _thermal(facts: Facts) -> str:
    thermal = facts.thermal
    if thermal is None or thermal.hottest_c is None:
        return NONE
    slowed = {True: "slowed down", False: "not slowed down", None: "not known whether it is slowed down"}
    return f"hottest zone {thermal.hottest_c:.0f} C, {slowed[thermal.throttled]}"


def _cuda(facts: Facts) -> str:
    cuda = facts.cuda
    if cuda is None or not cuda.asked:
        return "not asked"
    if cuda.torch is None:
        return "no torch"
    right = {True: "products right", False: "products WRONG", None: "no product computed"}[cuda.products_right]
    return f"torch {cuda.torch} for CUDA {cuda.built_for_cuda or 'none'} on {cuda.device or 'no GPU'}: {right}"


def _wifi(facts: Facts) -> str:
    described = []
    for wifi in facts.wifi or []:
        save = {True: "on", False: "off", None: NONE}[wifi.power_save]
        signal = f"{wifi.signal_dbm} dBm" if wifi.signal_dbm is not None else "no signal"
        described.append(f"{wifi.interface}: {wifi.band or 'no band'}, {signal}, power save {save}")
    return "; ".join(described) or ("none" if facts.wifi is not None else NONE)


def _time(facts: Facts) -> str:
    time = facts.time
    if time is None or time.abs_offset_s is None or time.bound_s is None:
        return NONE
    return f"{time.abs_offset_s * 1000:.3f} ms off {time.server}, which may be {time.bound_s * 1000:.3f} ms off"


def _route(facts: Facts) -> str:
    route = facts.route
    if route is None:
        return "not asked: name the base station with --bs"
    return f"{route.bs} by {route.interface} ({route.medium}) from {route.source}" if route.interface else NONE
