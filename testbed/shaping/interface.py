"""An interface whose rates are to be shaped: what must hold before, and how it becomes again what it was."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from testbed.errors import ConfigError

HANDLE = "d0e:"  # of our qdisc: the kernel gives out 8000: and above by itself, and 0: is its own default
CAP_NET_ADMIN = 1 << 12
TOOL_ENDS_WITHIN_S = 20.0


class Interface:
    """Claimed for one process, and freed of what an earlier one left when it was killed; `restore` gives it back.

    The kernel's segmentation offload is the trap: TCP hands over up to 64 KiB as one frame, which passes a bucket of
    3 kB at once. So at most one segment makes a frame while we shape. That setting outlives a killed process; what it
    was before is kept where it vanishes with the qdisc: as the qdisc's `r2q`, which nothing reads, since every class
    names its quantum.
    """

    def __init__(self, name: str) -> None:
        """Raises ConfigError, in one line, where this machine, this user or this interface does not allow shaping."""
        _require_means(name)
        self.name = name
        self._claim = _claim(name)
        try:
            self._clear()
            self._segments = self._segments_per_frame()
        except BaseException:
            self._claim.close()
            raise

    def _clear(self) -> None:
        """Until only the kernel's default is left, which comes back by itself once ours is removed."""
        kind, handle, kept_segments = self._root_qdisc()
        if handle == HANDLE:
            self._put_back(kept_segments)
            kind, handle, _ = self._root_qdisc()
        if handle != "0:":
            raise ConfigError(
                f"rate shaping: {self.name} has a root qdisc of its own ({kind} {handle}), which would be lost: name "
                f"another interface, or remove it with `tc qdisc delete dev {self.name} root`"
            )

    def qdisc_line(self) -> str:
        """Adds our qdisc. A frame weighs the TCP payload it carries: its headers (66 bytes) are taken off."""
        htb = f"htb r2q {self._segments} default 0"  # there is no class 0: what no filter names is not shaped
        return f"qdisc add dev {self.name} root handle {HANDLE} stab overhead -66 linklayer ethernet {htb}"

    def one_segment_per_frame(self) -> None:
        """Only once our qdisc is there, which keeps what it was. Connections made earlier keep their frames."""
        _run("ip", "link", "set", "dev", self.name, "gso_max_segs", "1")

    def require_route(self, device: str, address: str) -> None:
        """Raises ConfigError where packets to the address leave by another interface."""
        (route,) = json.loads(_run("ip", "-json", "route", "get", address))
        if route.get("dev") != self.name:
            way = f"is reached by {route.get('dev')}, not by {self.name}: name that one"
            raise ConfigError(f"rate shaping: {device} ({address}) {way}")

    def restore(self) -> None:
        """Without our qdisc the kernel puts its default back. Nothing is removed that is not ours."""
        if self._claim.fileno() < 0:
            return
        try:
            if self._is_ours():
                self._put_back(self._segments)
        finally:
            self._claim.close()

    def _is_ours(self) -> bool:
        there = any(name == self.name for _, name in socket.if_nameindex())  # or unplugged meanwhile
        return there and self._root_qdisc()[1] == HANDLE

    def _put_back(self, segments: int) -> None:
        """The qdisc last: it is what tells the next one of a restoring that was cut short."""
        _run("ip", "link", "set", "dev", self.name, "gso_max_segs", str(segments))
        _run("tc", "qdisc", "delete", "dev", self.name, "root", "handle", HANDLE)

    def _root_qdisc(self) -> tuple[str, str, int]:
        """Kind, handle and r2q (0 where it has none)."""
        listed = _run("tc", "qdisc", "show", "dev", self.name)
        found = re.search(r"^qdisc (\S+) (\S+) root\b(?:.* r2q (\d+))?", listed, re.MULTILINE)
        return (found[1], found[2], int(found[3] or 0)) if found else ("none", "0:", 0)

    def _segments_per_frame(self) -> int:
        (link,) = json.loads(_run("ip", "-json", "-details", "link", "show", "dev", self.name))
        return int(link["gso_max_segs"])


def _require_means(interface: str) -> None:
    if not sys.platform.startswith("linux"):
        raise ConfigError("rate shaping needs Linux: start without it")
    if not _effective_capabilities() & CAP_NET_ADMIN:
        raise ConfigError("rate shaping needs root or CAP_NET_ADMIN: start as root, or without rate shaping")
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        raise ConfigError(f"rate shaping needs {' and '.join(tools)}: install the package iproute2")
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise ConfigError(f"rate shaping: no interface {interface!r}; there are {', '.join(names)}: name one of them")


def _effective_capabilities() -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _claim(interface: str) -> socket.socket:
    """An abstract name: like the interface it belongs to a network namespace, and it is free again after a kill."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0wdmoe-shaping-{interface}")
    except OSError:
        claim.close()
        raise ConfigError(
            f"rate shaping: {interface} is already shaped by a running program: stop that first"
        ) from None
    return claim


def _run(*command: str) -> str:
    """What a tool prints. Raises ConfigError with its own words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TOOL_ENDS_WITHIN_S)
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or "no reason given"
        raise ConfigError(f"rate shaping: {' '.join(command)}: {words[:300]}: mend that, or start without rate shaping")
    return done.stdout
