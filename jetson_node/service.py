"""A node as a service of systemd: it says when it serves, and keeps the watchdog quiet only while its loop turns."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

PINGS_PER_PERIOD = 4  # of the watchdog's: one lost to a busy moment must not kill a node


def told_to_systemd(
    stop: Callable[[], bool],
    environment: Mapping[str, str] = os.environ,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> Callable[[], bool]:
    """`stop`, which the one loop asks in every turn, also telling systemd what being asked means.

    READY=1 when asked first, as the experts are loaded then; WATCHDOG=1 from the loop alone, so that a node that hangs
    is restarted; STOPPING=1 once the answer is yes. Not started by systemd as Type=notify: `stop` itself.
    The protocol is sd_notify(3)'s.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return stop
    address = "\0" + address[1:] if address[0] == "@" else address
    every_ns = _watchdog_ns(environment) // PINGS_PER_PERIOD
    next_ns: int | None = None

    def asked() -> bool:
        nonlocal next_ns
        now = now_ns()
        if next_ns is None:
            _tell(address, "READY=1\nSTATUS=serving experts")
            next_ns = now
        if every_ns and now >= next_ns:
            _tell(address, "WATCHDOG=1")
            next_ns = now + every_ns
        stopping = stop()
        if stopping:
            _tell(address, "STOPPING=1")
        return stopping

    return asked


def _watchdog_ns(environment: Mapping[str, str]) -> int:
    """0 where no watchdog waits for this process."""
    period_us, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID")
    if not period_us.isdecimal() or pid not in (None, str(os.getpid())):
        return 0
    return int(period_us) * 1000


def _tell(address: str, state: str) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)  # systemd is busy or restarts itself: the next turn tells it again
        sender.sendto(state.encode(), address)
