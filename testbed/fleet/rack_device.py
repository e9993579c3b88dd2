"""One device of a virtual rack: a container booted by systemd-nspawn, and what can happen to a board."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from testbed.errors import ConfigError
from testbed.fleet.rack_network import RackNetwork
from testbed.fleet.rack_root import USER
from testbed.fleet.rack_system import DeviceCgroup, remove_tree, tool

BOOTS_WITHIN_S = 90.0
SSH_PORT = 22
USER_ID = 1000
LOOK_EVERY_S = 0.05
REBOOT = 133  # what systemd-nspawn ends with where the device asked for one

# Joins the device's cgroups before anything else, so that whatever it starts is found there and nowhere else.
KEEPER = f"""
for folder in $GROUPS_OF_DEVICE; do echo $$ > "$folder/cgroup.procs" || exit 1; done
while :; do
    systemd-nspawn "$@"
    [ $? = {REBOOT} ] || exit
done
"""


class Layers(NamedTuple):
    """Folders that a device's root is laid over, the topmost first, and systemd-nspawn's arguments for the rest."""

    folders: tuple[Path, ...]
    arguments: tuple[str, ...]


class RackDevice:
    """The device number `n`; its files lie in `folder`, which need not be there yet."""

    def __init__(self, name: str, n: int, network: RackNetwork, folder: Path) -> None:
        self.name, self.n, self.folder, self._network = name, n, folder, network
        self.address = network.address(n)
        self._root = folder / "root"
        self._cgroup = DeviceCgroup(f"{network.table}-{n}")

    def make(self, layers: Layers, authorized_key: str, hosts: str) -> str:
        """Lay out its files as those of a board that was just flashed. Returns its public host key."""
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True)
            (self.folder / part).chmod(0o755)
        lower = ":".join(map(str, layers.folders))
        options = f"lowerdir={lower},upperdir={self.folder}/upper,workdir={self.folder}/work"
        tool("mount", "-t", "overlay", self._network.link(self.n), "-o", options, self._root)
        etc = self._root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (etc / "machine-id").write_text(tool("systemd-id128", "new"))
        host_key = etc / "ssh" / "ssh_host_ed25519_key"
        tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", host_key)
        authorized = self._root / "home" / USER / ".ssh" / "authorized_keys"
        authorized.parent.mkdir(mode=0o700)
        authorized.write_text(authorized_key)
        for path in (authorized.parent, authorized):
            os.chown(path, USER_ID, USER_ID)
        return host_key.with_suffix(".pub").read_text()

    def boot(self, arguments: tuple[str, ...]) -> None:
        """Switch it on. It stays on when this program ends."""
        if self._cgroup.populated:
            raise ConfigError(f"{self.name}: is on already: testbed rack reboot {self.name}")
        self._cgroup.make()
        command = [
            "--quiet", "--register=no", "--keep-unit", "--boot", f"--machine={self.name}", f"--directory={self._root}",
            f"--network-namespace-path=/run/netns/{self._network.link(self.n)}", "--capability=CAP_NET_ADMIN",
            "--system-call-filter=bpf", "--resolv-conf=replace-host", "--link-journal=no", "--console=pipe", *arguments,
        ]  # fmt: skip
        groups = " ".join(map(str, self._cgroup.folders))
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "GROUPS_OF_DEVICE": groups}
        with (self.folder / "console.log").open("ab") as console:
            subprocess.Popen(
                ["sh", "-c", KEEPER, "rack-keeper", *command], stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env=environment, start_new_session=True, cwd="/",
            )  # fmt: skip

    def wait_for_ssh(self, since: int | None = None) -> None:
        """Until it answers, after a reboot by a process other than `since`. Raises ConfigError with its last words."""
        self._wait(lambda: self.guest_init() not in (None, since) and self.answers_ssh(), "answers ssh")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        started_s = time.monotonic()
        while not done():
            waited_s = time.monotonic() - started_s
            if waited_s > BOOTS_WITHIN_S or (waited_s > 5.0 and not self._cgroup.populated):
                raise ConfigError(f"{self.name}: never {what}; its console said last: {self.last_words()}")
            time.sleep(LOOK_EVERY_S)

    def last_words(self) -> str:
        console = self.folder / "console.log"
        lines = console.read_text(errors="replace").split("\n") if console.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:300]

    def answers_ssh(self, timeout_s: float = 1.0) -> bool:
        try:
            with socket.create_connection((self.address, SSH_PORT), timeout=timeout_s) as connection:
                connection.settimeout(timeout_s)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def guest_init(self) -> int | None:
        return self._cgroup.guest_init()

    @property
    def power(self) -> str:
        if not self._cgroup.populated:
            return "off"
        return "frozen" if self._cgroup.frozen else "on"

    @property
    def link_up(self) -> bool:
        return self._network.is_up(self.n)

    def freeze(self) -> None:
        """Hang it: the kernel still accepts connections, no program answers."""
        self._require_on()
        self._cgroup.freeze(True)

    def thaw(self) -> None:
        self._require_on()
        self._cgroup.freeze(False)

    def cut(self) -> None:
        """Take its link away."""
        self._network.set_link(self.n, up=False)

    def mend(self) -> None:
        self._network.set_link(self.n, up=True)

    def kill(self) -> None:
        """Cut its power: every process at once. What it wrote is there when it is switched on again."""
        self._require_on()
        self._cgroup.kill()

    def reboot(self, arguments: tuple[str, ...]) -> None:
        """Reboot it in order, or switch it on where it is off; returns when it answers ssh again."""
        before = self.guest_init()
        if before is None:
            self.boot(arguments)
        else:
            if self._cgroup.frozen:
                raise ConfigError(f"{self.name}: is frozen and hears nothing: thaw it first, or kill it")
            os.kill(before, signal.SIGINT)  # Ctrl-Alt-Del
        if self.link_up:
            self.wait_for_ssh(since=before)
        else:
            self._wait(lambda: self.guest_init() not in (None, before), "came up")

    def _require_on(self) -> None:
        if self.power == "off":
            raise ConfigError(f"{self.name}: is off: testbed rack reboot {self.name} switches it on")

    def remove(self) -> None:
        """End it and remove its files, as far as any are there."""
        self._cgroup.remove()
        remove_tree(self.folder)
