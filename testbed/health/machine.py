"""Checks of this machine, each one line: how it stands, and what to do where something is wrong."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from testbed.paths import cache_directory, runtime_directory

Level = Literal["ok", "warning", "problem"]
Verdict = tuple[Level, str]
DISTRIBUTION = "wdmoe-testbed"
LEAST_LIBZMQ = (4, 3, 5)  # older ones let a stranger crash or starve a CURVE server
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")
WHAT_AUTO_IS = """
from torch import cuda
print(f'CUDA, device auto is {cuda.get_device_name()}' if cuda.is_available() else 'no CUDA, device auto is the CPU')
"""


def python() -> Verdict:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):
        return "warning", f"{version} can run a node; the base station needs 3.11 or newer"
    return "ok", version


def packages() -> Verdict:
    found, wrong = _installed(_requirements())
    if wrong:
        return "problem", f"{', '.join(wrong)}; pip install --upgrade {DISTRIBUTION}"
    return "ok", ", ".join(found)


def base_station(needed: bool) -> Verdict:
    """Torch and transformers: a node can do without them, so they are a problem only where a run file is checked."""
    found, wrong = _installed(_requirements("bs"))
    if wrong:
        remedy = f"pip install '{DISTRIBUTION}[bs]'; without it this machine can only be a node with the numpy backend"
        return "problem" if needed else "warning", f"{', '.join(wrong)}; {remedy}"
    loads, answer = _ask(WHAT_AUTO_IS)
    if not loads:
        return "problem", f"torch is installed but does not load ({answer}); install it again for this machine"
    return "ok", f"{', '.join(found)}, {answer}"


def _ask(code: str) -> tuple[bool, str]:
    """Whether `code` runs in a Python of its own, and its last line: a library may take its process down with it."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _requirements(extra: str | None = None) -> dict[str, str]:
    """Least version of each package that this distribution, or one of its extras, asks for."""
    least = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"extra == ['\"](\w+)", marker)
        if (wanted[1] if wanted else None) != extra or ("python_version" in marker and sys.version_info >= (3, 11)):
            continue
        name, version = re.match(r"[\w.-]+", requirement), re.search(r">=\s*([\d.]+)", requirement)
        if name:
            least[name[0]] = version[1] if version else "0"
    return least


def _installed(least: dict[str, str]) -> tuple[list[str], list[str]]:
    """What is there and new enough, and what is not."""
    found, wrong = [], []
    for name, version in least.items():
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if _numbers(here) < _numbers(version):
            wrong.append(f"{name} {here} is older than {version}")
        found.append(f"{name} {here}")
    return found, wrong


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def zeromq() -> Verdict:
    loads, answer = _ask("import zmq; print(zmq.zmq_version(), zmq.has('curve'))")
    if not loads:
        return "problem", f"pyzmq does not load ({answer}); pip install --force-reinstall pyzmq"
    version, curve = answer.split()
    if _numbers(version) < LEAST_LIBZMQ:
        return "problem", f"libzmq {version} is older than 4.3.5; pip install --upgrade pyzmq: its wheel is newer"
    if curve != "True":
        return (
            "problem",
            f"libzmq {version} has no CURVE encryption; pip install --force-reinstall pyzmq: its wheel has",
        )
    return "ok", f"libzmq {version} with CURVE"


def loopback() -> Verdict:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2)
        with socket.create_connection(server.getsockname(), timeout=2) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"?")
                arrived = accepted.recv(1)
    return ("ok", "127.0.0.1 answers") if arrived else ("problem", "127.0.0.1 carries nothing; check the firewall")


def private_folders() -> Verdict:
    return "ok", f"keys in {runtime_directory()}, cache in {cache_directory()}"


def clock() -> Verdict:
    resolution_ns = round(time.get_clock_info("monotonic").resolution * 1e9)
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    name = source.read_text().strip() if source.exists() else "unknown source"
    if name in SLOW_CLOCKS or resolution_ns > 1000:
        return "warning", f"{name}, {resolution_ns} ns: reading it is slow or coarse; choose another clocksource"
    return "ok", f"{name}, {resolution_ns} ns"


MACHINE_CHECKS: dict[str, Callable[[], Verdict]] = {
    "python": python,
    "packages": packages,
    "zeromq": zeromq,
    "loopback": loopback,
    "folders": private_folders,
    "clock": clock,
}
