"""What a virtual rack needs of this machine: root, tools, overlays, and a cgroup of its own for every device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from testbed.errors import ConfigError

PACKAGE_OF = {
    "debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "ip": "iproute2", "tc": "iproute2",
    "nft": "nftables", "ssh-keygen": "openssh-client", "setpriv": "util-linux", "unshare": "util-linux",
}  # fmt: skip
CAPABILITIES = 1 << 12 | 1 << 21  # CAP_NET_ADMIN, CAP_SYS_ADMIN
V1_CONTROLLERS = ("name=systemd", "cpu", "pids")  # those that systemd-nspawn wants to be in, where cgroups are v1
TOOL_ENDS_WITHIN_S = 30.0
REMOVED_WITHIN_S = 600.0  # some gigabytes of small files, on a disk that others use
KILLED_WITHIN_S = 20.0


def require_means() -> None:
    """Raises ConfigError with all that this machine or user lacks, in one line."""
    reason = missing()
    if reason is not None:
        raise ConfigError(f"testbed rack: {reason}")


def missing() -> str | None:
    """What is missing for a virtual rack, in words; None where nothing is."""
    if not sys.platform.startswith("linux"):
        return 'needs Linux: use [fleet] start = "local" in the run file, which runs everywhere'
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(effective[1], 16) if effective else 0
    if os.geteuid() != 0 or held & CAPABILITIES != CAPABILITIES:
        return "needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN: run it with sudo"
    packages = sorted({package for tool, package in PACKAGE_OF.items() if shutil.which(tool) is None})
    if packages:
        return f"packages are missing: apt-get install {' '.join(packages)}"
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        return "this kernel has no overlay file system: modprobe overlay"
    if unified_hierarchy() is None:
        return "no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified"
    return None


def unified_hierarchy() -> Path | None:
    """Where cgroup v2 is mounted, alone or beside v1."""
    return next((Path(where) for _, where, kind, _ in _mounts() if kind == "cgroup2"), None)


def _mounts() -> list[tuple[str, str, str, str]]:
    """Source, mount point, type and options of everything mounted; the kernel's escapes (\\040) are undone."""
    lines = Path("/proc/mounts").read_text().splitlines()
    fields = ([re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), part) for part in line.split(" ")] for line in lines)
    return [(source, where, kind, options) for source, where, kind, options, *_ in fields]


def overlays(prefix: str) -> list[Path]:
    """Mount points of overlays whose source begins with `prefix`."""
    return [Path(where) for source, where, kind, _ in _mounts() if kind == "overlay" and source.startswith(prefix)]


def mounted_below(folder: Path) -> list[Path]:
    """Mount points at or below a folder, the deepest first."""
    points = [Path(where) for _, where, _, _ in _mounts()]
    return sorted((point for point in points if point.is_relative_to(folder)), key=lambda p: -len(p.parts))


def tool(*command: str | Path, lines: Sequence[str] | None = None, within_s: float = TOOL_ENDS_WITHIN_S) -> str:
    """Run a tool of the system and return what it prints; `lines` are its input. Raises ConfigError in its words."""
    given = None if lines is None else "\n".join(lines) + "\n"
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=given, stdin=subprocess.DEVNULL if given is None else None, capture_output=True, text=True,
            check=False, timeout=within_s, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"testbed rack: {' '.join(words)}: no end within {within_s:g} s") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or "no reason given"
        raise ConfigError(f"testbed rack: {' '.join(words)}: {said[:400]}; testbed rack down cleans up")
    return done.stdout


def remove_tree(folder: Path) -> None:
    """Remove a folder with all below it, and nothing that is mounted there: mounts go first, or nothing goes."""
    for point in mounted_below(folder):
        tool("umount", point)
    if folder.exists():
        tool("rm", "-rf", "--one-file-system", "--", folder, within_s=REMOVED_WITHIN_S)


class DeviceCgroup:
    """One device's processes: known even where the program that started them is gone, ended or held all at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        unified = unified_hierarchy()
        if unified is None:
            raise ConfigError("testbed rack: no cgroup v2 hierarchy is mounted")
        self._unified = unified / name
        v1 = [
            Path(where) / name
            for _, where, kind, options in _mounts()
            if kind == "cgroup" and any(controller in options.split(",") for controller in V1_CONTROLLERS)
        ]
        self.folders = [self._unified, *v1]

    @classmethod
    def named(cls, prefix: str) -> list[DeviceCgroup]:
        """Those there are whose name begins so."""
        roots = [folder.parent for folder in cls(prefix).folders]
        return [cls(name) for name in sorted({path.name for root in roots for path in root.glob(f"{prefix}*")})]

    def make(self) -> None:
        for folder in self.folders:
            folder.mkdir(exist_ok=True)

    @property
    def populated(self) -> bool:
        return self._events().get("populated") == "1"

    @property
    def frozen(self) -> bool:
        return self._events().get("frozen") == "1"

    def _events(self) -> dict[str, str]:
        try:
            text = (self._unified / "cgroup.events").read_text()
        except OSError:
            return {}
        return dict(line.split(" ", 1) for line in text.splitlines())

    def processes(self) -> list[int]:
        found = []
        for file in self._unified.rglob("cgroup.procs"):
            with suppress(OSError):  # a group that has just gone
                found += [int(line) for line in file.read_text().split()]
        return found

    def guest_init(self) -> int | None:
        """The process that is number 1 inside the device, as this machine numbers it."""
        for pid in self.processes():
            with suppress(OSError):
                numbers = re.search(r"^NSpid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                if numbers and len(inside := numbers[1].split()) > 1 and inside[-1] == "1":
                    return pid
        return None

    def freeze(self, frozen: bool) -> None:
        (self._unified / "cgroup.freeze").write_text("1" if frozen else "0")

    def kill(self) -> None:
        """End every process at once, and wait until the kernel says that none is left. Raises ConfigError."""
        if not self._unified.is_dir():
            return
        (self._unified / "cgroup.kill").write_text("1")
        deadline_s = time.monotonic() + KILLED_WITHIN_S
        while self.populated:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"testbed rack: processes of {self._unified} do not end: look at them with ps")
            time.sleep(0.01)

    def remove(self) -> None:
        """End what runs there and remove the groups, the deepest first."""
        self.kill()
        for root in self.folders:
            folders = [folder for folder in root.rglob("*") if folder.is_dir()]
            for folder in [*sorted(folders, key=lambda path: -len(path.parts)), root]:
                with suppress(FileNotFoundError):
                    folder.rmdir()
