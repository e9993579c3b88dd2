"""Network namespaces and links by the tools of the system: what there is, what is missing, how to be rid of it."""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from testbed.errors import ConfigError

NAMESPACES = Path("/run/netns")  # where ip keeps them
NAME = re.compile(r"wdmoe-(\d+)-(\d+)-(\d+)")  # process, subnet, device
SUBNETS = list(ipaddress.IPv4Network("198.18.0.0/15").subnets(new_prefix=24))  # set aside for benchmarks (RFC 2544)
TOOL_ENDS_WITHIN_S = 20.0
CAPABILITIES = 1 << 12 | 1 << 21  # CAP_NET_ADMIN, CAP_SYS_ADMIN
INSTEAD = 'or set links = "relay", which needs neither root nor tools'


def missing() -> str | None:
    """What this machine or user lacks for links in the kernel, in one line; None where nothing does."""
    if not sys.platform.startswith("linux"):
        return 'links = "namespaces" needs Linux: set links = "relay", which runs everywhere'
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(effective[1], 16) if effective else 0
    if os.geteuid() != 0 or held & CAPABILITIES != CAPABILITIES:
        return f'links = "namespaces" needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN: run it so, {INSTEAD}'
    tools = [tool for tool in ("ip", "tc", "ss") if shutil.which(tool) is None]
    if tools:
        return f'links = "namespaces" needs {", ".join(tools)}: install the package iproute2, {INSTEAD}'
    return None


def enter(namespace: str) -> None:
    """Put the calling thread, and those it starts from now on, into a namespace: call it before any is started.

    Sockets opened earlier stay where they are. Raises ConfigError if that cannot be.
    """
    try:
        descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_network_namespace(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = f"{error.strerror}: start the run again as root, {INSTEAD}"
        raise ConfigError(f"cannot enter the network namespace {namespace}: {reason}") from None


def _set_network_namespace(descriptor: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(descriptor, os.CLONE_NEWNET)
    else:
        clone_newnet = 0x40000000
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def remove_leftovers() -> None:
    """Remove what processes that no longer live have left."""
    left = ([int(part) for part in match.groups()] for match in existing())
    remove(names(pid, subnet, n) for pid, subnet, n in left if not psutil.pid_exists(pid))


def existing() -> list[re.Match[str]]:
    names = (path.name for path in NAMESPACES.iterdir()) if NAMESPACES.is_dir() else ()
    return [match for match in map(NAME.fullmatch, names) if match]


def names(pid: int, subnet: int, device: int) -> tuple[str, str]:
    """Names of the namespace and of the base station's end, for which 15 characters are the most."""
    return f"wdmoe-{pid}-{subnet}-{device}", f"wd{pid:x}-{subnet:x}-{device:x}"


def free_subnet() -> int:
    """Index into SUBNETS of one that neither another run nor any route of this machine touches."""
    taken = {int(match[2]) for match in existing()}
    listed = subprocess.run(["ip", "-json", "-4", "route", "show", "table", "all"], capture_output=True, check=True)
    written = [route["dst"] for route in json.loads(listed.stdout) if route["dst"] != "default"]
    routes = [ipaddress.IPv4Network(destination) for destination in written]
    for offset in range(len(SUBNETS)):
        subnet = (os.getpid() + offset) % len(SUBNETS)
        if subnet not in taken and not any(SUBNETS[subnet].overlaps(route) for route in routes):
            return subnet
    raise ConfigError(f'links = "namespaces" needs a free subnet of 198.18.0.0/15: free one, {INSTEAD}')


def drop_connections(namespace: str | None, peer: str) -> None:
    """End every TCP connection with the address, as an aborting program would."""
    where = [] if namespace is None else ["-N", namespace]
    subprocess.run(["ss", *where, "-K", "dst", peer], capture_output=True, check=True, timeout=TOOL_ENDS_WITHIN_S)


def remove(names: Iterable[tuple[str, str]]) -> None:
    """Remove links and namespaces, as far as they are there. Links first: a process in a namespace keeps it alive."""
    lines = [line for namespace, end in names for line in (f"link delete {end}", f"netns delete {namespace}")]
    if lines:
        command = ["ip", "-force", "-batch", "-"]
        subprocess.run(command, input="\n".join(lines).encode(), capture_output=True, check=False)


def run(commands: Mapping[tuple[str, str | None], Sequence[str]]) -> None:
    """Lines for `ip` or `tc`, each batch in its namespace, all batches at once. Raises ConfigError."""
    started = []
    for (tool, namespace), lines in commands.items():
        where = [] if namespace is None else ["-n", namespace]
        with tempfile.TemporaryFile() as batch:
            batch.write("\n".join(lines).encode())
            batch.seek(0)
            command = [tool, *where, "-batch", "-"]
            process = subprocess.Popen(command, stdin=batch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        started.append((tool, lines, process))
    said = [process.communicate(timeout=TOOL_ENDS_WITHIN_S)[1].decode().splitlines() for *_, process in started]
    for (tool, lines, process), words in zip(started, said, strict=True):
        if process.returncode != 0:
            failed = re.search(r"Command failed -:(\d+)", "\n".join(words))
            line = f" {lines[int(failed[1]) - 1]}" if failed else ""
            raise ConfigError(f"{tool}{line}: {words[0] if words else 'no reason given'}: mend that, {INSTEAD}")
